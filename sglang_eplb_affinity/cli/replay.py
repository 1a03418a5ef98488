"""``replay``: a day of drifting traffic, to see how often to rebalance."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sglang_eplb_affinity.cli.options import FILE, FINITE, check_output, dense_layers_option, seed_option
from sglang_eplb_affinity.cli.progress import progress
from sglang_eplb_affinity.cli.simulate import command_line, configured, numbers
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.simulate import report
from sglang_eplb_affinity.simulate.day_report import day_table, plot_day
from sglang_eplb_affinity.simulate.replay import HOURS, Day, standard_policies
from sglang_eplb_affinity.simulate.source import RoutingSource, load_recording, sampled_layers
from sglang_eplb_affinity.simulate.system import preset_names


@click.command("replay")
@click.option("--trace", type=FILE, required=True, help="Recorded routing (.npz) with domains.")
@click.option("--test-trace", type=FILE, help="Routing to serve.  [default: held-out sequences of --trace]")
@dense_layers_option
@click.option("--topology", required=True, help=f"YAML file, or a preset: {', '.join(preset_names())}.")
@click.option("--gpus", type=int, help="EP size.  [default: the topology's]")
@click.option("--redundant", type=int, help="Redundant experts.  [default: the topology's]")
@click.option("--phase", type=click.Choice(["prefill", "decode"]), default="prefill", show_default=True)
@click.option("--windows", default=24, show_default=True, help="Windows that the day is cut into.")
@click.option("--every", default="1,3,8", show_default=True, help="Rebalance every so many windows; several.")
@click.option("--max-moves", default=2, show_default=True, help="Asynchronous: experts moved per GPU, layer and round.")
@click.option("--rounds", default=4, show_default=True, help="Asynchronous: rounds of a rebalance.")
@click.option(
    "--min-gain", type=FINITE, default=0.01, show_default=True, help="Asynchronous: least gain of a layer to act."
)
@click.option(
    "--pass-tokens", "--tokens-per-gpu", "pass_tokens", type=click.IntRange(1), default=1024, show_default=True,
    help="Tokens of one GPU in one pass: what step time, pass load and cover_balanced see.",
)  # fmt: skip
@click.option(
    "--dispatch", "rule", type=click.Choice(DISPATCH_RULES),
    help="Affinity's replica choice.  [default: in low latency primary on one node and static over several, static in "
    "decode with v2 on one node, else cover_balanced]",
)  # fmt: skip
@click.option("--layers", default=3, show_default=True, help="MoE layers to simulate; 0: all.")
@seed_option
@click.option("--out", type=FILE, help="Write the full result as JSON.")
@click.option("--plots", type=FILE, help="Folder for plots (PNG).")
def replay_command(
    trace: Path, test_trace: Path | None, dense_layers: int,
    topology: str, gpus: int | None, redundant: int | None, phase: str,
    windows: int, every: str, max_moves: int, rounds: int, min_gain: float, pass_tokens: int,
    rule: DispatchRule | None, layers: int, seed: int,
    out: Path | None, plots: Path | None,
) -> None:  # fmt: skip
    """Serve a day whose domains drift by the hour, under four policies and several rebalance intervals.

    \b
    Example:
      python -m sglang_eplb_affinity replay --trace bench/data/tiny_moe_plan.npz --topology qwen3-235b-h200 \\
          --every 1,4,16 --out day.json
    """
    system = configured(topology, None, None, None)
    system = system.resized(system.cluster.gpus if gpus is None else gpus, redundant)
    if out is not None:
        check_output(out, standard_output=False)
    if plots is not None and not plots.is_dir():
        raise InputError(f"--plots {plots}: no such folder")
    if max_moves < 1 or rounds < 1 or min_gain < 0:
        raise InputError("--max-moves and --rounds must be at least 1, --min-gain 0 or more")
    policies = standard_policies([*numbers(every, "--every"), -1], max_moves, min_gain, rounds, rule)
    test = None if test_trace is None else RoutingTrace.load(test_trace)
    source = RoutingSource(
        load_recording(trace, (), dense_layers), test, system.model, sampled_layers(system.model, layers), seed=seed
    )
    day = Day(system, source, prefill=phase == "prefill", windows=windows, tokens_per_gpu=pass_tokens)
    with progress(windows, "replaying") as done:
        results = day.run(policies, done)
    head = {
        **report.header(system, source.label, command_line()),
        "phase": phase,
        "gpus": system.cluster.gpus,
        "pass_tokens": pass_tokens,
    }
    head["window_minutes"] = 60 * HOURS / windows
    if out is not None:
        text = json.dumps({**head, "days": [result.to_json() for result in results]}, indent=1)
        write_atomically(out, (text + "\n").encode())
    if plots is not None:
        click.echo(f"{plot_day(results, head, plots)} written", err=True)
    click.echo(
        f"SIMULATED. {system.name}, {system.cluster.gpus} GPUs, {phase}, passes of {pass_tokens} tokens a GPU. "
        f"Routing: {source.label}."
    )
    click.echo(day_table(results))
