"""``simulate``: routing x cluster x algorithm to step times, before any rollout."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import get_args

import click

from sglang_eplb_affinity.cli.options import FILE, FINITE, check_output, dense_layers_option, seed_option
from sglang_eplb_affinity.cli.plan_flags import check_further_slots
from sglang_eplb_affinity.cli.progress import progress
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.planner.config import Effort
from sglang_eplb_affinity.simulate import report
from sglang_eplb_affinity.simulate.routing_model import CHILD_SPREAD
from sglang_eplb_affinity.simulate.scenario import (
    ALGORITHMS,
    PHASES,
    Algorithm,
    Phase,
    PhaseResult,
    runs_of,
    simulate,
    with_overlap,
)
from sglang_eplb_affinity.simulate.source import RoutingSource, load_recording, sampled_layers
from sglang_eplb_affinity.simulate.system import DeepEPMode, System, load_system, preset_names


def numbers(text: str | None, flag: str) -> list[int]:
    """``8,16`` as a list, each number once; [] for None."""
    if text is None:
        return []
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise InputError(f"{flag} {text}: expected whole numbers above 0, separated by commas")
    return list(dict.fromkeys(values))


def command_line() -> str:
    return shlex.join(["python", "-m", "sglang_eplb_affinity", *sys.argv[1:]])


@click.command("simulate")
@click.option("--trace", type=FILE, help="Recorded routing (.npz).")
@click.option("--dump", "dumps", type=FILE, multiple=True, help="SGLang recorder dump with token sets (.pt).")
@click.option("--test-trace", type=FILE, help="Routing to simulate on.  [default: held-out sequences of --trace]")
@dense_layers_option
@click.option("--topology", required=True, help=f"YAML file, or a preset: {', '.join(preset_names())}.")
@click.option("--gpus", "gpu_list", help="EP sizes, such as 8,16,32,64,144,320.  [default: the topology's]")
@click.option("--redundant", type=int, help="Redundant experts.  [default: the topology's, raised until it divides]")
@click.option(
    "--algorithm", "algorithms", type=click.Choice(ALGORITHMS), multiple=True, default=ALGORITHMS, show_default=True,
    help="May repeat. eplb is what SGLang's `auto` picks, with static dispatch.",
)  # fmt: skip
@click.option(
    "--dispatch", "rules", type=click.Choice(DISPATCH_RULES), multiple=True,
    help="Affinity's replica choice; may repeat.  [default: static and primary in low latency and "
    "in decode with v2 on one node, else cover_balanced]",
)  # fmt: skip
@click.option(
    "--further-slots", type=click.IntRange(0), multiple=True, default=(0,), show_default=True,
    help="Slots of each GPU that small passes use besides the primary ones, under primary; may repeat.",
)  # fmt: skip
@click.option("--effort", type=click.Choice(["fast", "thorough"]), default="fast", show_default=True)
@click.option("--phase", "phases", type=click.Choice(PHASES), multiple=True, default=PHASES, show_default=True)
@click.option("--prefill-tokens", help="Tokens on each GPU in a prefill step, such as 2048,8192.")
@click.option("--decode-batch", help="Running requests on each GPU, such as 32,128,256.")
@click.option("--prefill-mode", type=click.Choice(get_args(DeepEPMode)), help="DeepEP mode; v2: DeepEP V2.")
@click.option("--decode-mode", type=click.Choice(get_args(DeepEPMode)), help="DeepEP mode; v2: DeepEP V2.")
@click.option("--overlap", type=click.Choice(["none", "two_batch"]), help="Overlap of communication and computation.")
@click.option("--layers", default=6, show_default=True, help="MoE layers to simulate, spread over the depth; 0: all.")
@click.option("--resamples", default=8, show_default=True, help="Batches drawn anew for the intervals.")
@click.option(
    "--child-spread", type=FINITE, default=CHILD_SPREAD, show_default=True,
    help="Only for routing made for a model with other experts than the trace: how unlike the made experts are.",
)  # fmt: skip
@seed_option
@click.option("--format", "style", type=click.Choice(["table", "json", "markdown"]), default="table", show_default=True)
@click.option("--out", type=FILE, help="Write the full result as JSON.")
@click.option("--plots", type=FILE, help="Folder for plots (PNG).")
def simulate_command(
    trace: Path | None, dumps: tuple[Path, ...], test_trace: Path | None, dense_layers: int,
    topology: str, gpu_list: str | None,
    redundant: int | None, algorithms: tuple[Algorithm, ...], rules: tuple[DispatchRule, ...],
    further_slots: tuple[int, ...], effort: Effort, phases: tuple[Phase, ...], prefill_tokens: str | None,
    decode_batch: str | None, prefill_mode: str | None, decode_mode: str | None, overlap: str | None, layers: int,
    resamples: int, child_spread: float, seed: int, style: str, out: Path | None, plots: Path | None,
) -> None:  # fmt: skip
    """Predict step time, TTFT, TPOT and tokens/s of placements on a cluster, from recorded routing.

    \b
    Example:
      python -m sglang_eplb_affinity simulate --trace bench/data/tiny_moe_plan.npz \\
          --topology deepseek-v3-h800 --gpus 32,144 --decode-batch 64,128 --out predicted.json
    """
    system = configured(topology, prefill_mode, decode_mode, overlap)
    if out is not None:
        check_output(out, standard_output=False)
    if plots is not None and not plots.is_dir():
        raise InputError(f"--plots {plots}: no such folder")
    if child_spread < 0:
        raise InputError(f"--child-spread {child_spread}: must be 0 or more")
    recording = load_recording(trace, dumps, dense_layers)
    test = None if test_trace is None else RoutingTrace.load(test_trace)
    systems = [system.resized(gpus, redundant) for gpus in numbers(gpu_list, "--gpus") or [system.cluster.gpus]]
    runs: list[tuple[Phase, int]] = []
    if "prefill" in phases:
        wanted = numbers(prefill_tokens, "--prefill-tokens") or [system.serving.prefill_tokens_per_gpu]
        runs += [("prefill", tokens) for tokens in wanted]
    if "decode" in phases:
        wanted = numbers(decode_batch, "--decode-batch") or [system.serving.decode_batch_per_gpu]
        runs += [("decode", tokens) for tokens in wanted]
    wanted_algorithms = list(dict.fromkeys(algorithms))
    results: list[PhaseResult] = []
    wanted_rules, further = list(dict.fromkeys(rules)), list(dict.fromkeys(further_slots))
    for each in systems:
        check_further_slots(max(further), each.serving.redundant_experts, each.cluster.gpus)
    total = sum(runs_of(each, runs, wanted_algorithms, resamples, wanted_rules, further) for each in systems)
    with progress(total, "simulating") as done:
        source = RoutingSource(
            recording, test, system.model, sampled_layers(system.model, layers), seed=seed, child_spread=child_spread
        )
        for each in systems:
            results += simulate(
                each, source, runs, wanted_algorithms, resamples=resamples, rules=wanted_rules, effort=effort,
                further_slots=further, progress=done,
            )  # fmt: skip
    head = report.header(system, source.label, command_line())
    prompt = system.serving.prompt_tokens
    full = json.dumps(report.to_json(head, results, prompt), indent=1)
    if out is not None:
        write_atomically(out, (full + "\n").encode())
    if plots is not None:
        for path in report.plot(results, head, plots):
            click.echo(f"{path} written", err=True)
    table = {"table": report.text_table, "markdown": lambda _h, r, p: report.markdown_table(r, p)}
    click.echo(full if style == "json" else table[style](head, results, prompt))


def configured(topology: str, prefill_mode: str | None, decode_mode: str | None, overlap: str | None) -> System:
    """The system with the command line's changes."""
    import dataclasses

    system = load_system(topology)
    changes = {"prefill_mode": prefill_mode, "decode_mode": decode_mode}
    serving = dataclasses.replace(system.serving, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
    system = dataclasses.replace(system, serving=serving)
    return system if overlap is None else with_overlap(system, overlap)
