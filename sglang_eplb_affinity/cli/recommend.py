"""``recommend``: what to enable on this cluster for this traffic, or why not to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from sglang_eplb_affinity.cli.options import FILE, FINITE, check_output, check_png, dense_layers_option, seed_option
from sglang_eplb_affinity.cli.progress import progress
from sglang_eplb_affinity.cli.simulate import command_line, configured
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.simulate import memory, report
from sglang_eplb_affinity.simulate.day_report import interval_text
from sglang_eplb_affinity.simulate.recommend import (
    DAY_WINDOWS,
    Recommendation,
    candidate_runs,
    decide,
    evaluate_candidates,
    interval_passes,
    recommend_interval,
)
from sglang_eplb_affinity.simulate.replay import DayResult
from sglang_eplb_affinity.simulate.scenario import PHASES, Interval, Phase
from sglang_eplb_affinity.simulate.source import RoutingSource, load_recording, sampled_layers
from sglang_eplb_affinity.simulate.system import System, preset_names
from sglang_eplb_affinity.simulate.v2_comparison import V2Comparison, compare_v2, comparison_runs


@click.command("recommend")
@click.option("--trace", type=FILE, help="Recorded routing (.npz).")
@click.option("--dump", "dumps", type=FILE, multiple=True, help="SGLang recorder dump with token sets (.pt).")
@click.option("--test-trace", type=FILE, help="Routing to judge on.  [default: held-out sequences of --trace]")
@dense_layers_option
@click.option("--topology", required=True, help=f"YAML file, or a preset: {', '.join(preset_names())}.")
@click.option("--gpus", type=int, help="EP size.  [default: the topology's]")
@click.option("--phase", "phases", type=click.Choice(PHASES), multiple=True, default=PHASES, show_default=True)
@click.option(
    "--pass-tokens", type=click.IntRange(1),
    help="Tokens of one GPU in one pass, that load is judged on.  [default: the topology's prefill step, "
    "decode batch]",
)  # fmt: skip
@click.option(
    "--dispatch", "rules", type=click.Choice(DISPATCH_RULES), multiple=True,
    help="Affinity's replica choice; may repeat: the best is taken.  [default: static and primary in low latency "
    "and in decode with DeepEP V2 on one node, else cover_balanced]",
)  # fmt: skip
@click.option(
    "--min-gain", type=FINITE, default=1.0, show_default=True, help="Least sure gain in % that is worth a switch."
)
@click.option("--layers", default=4, show_default=True, help="MoE layers to simulate, spread over the depth; 0: all.")
@click.option("--resamples", default=5, show_default=True, help="Batches drawn anew for the intervals.")
@click.option(
    "--memory-gb", help="Memory free for experts on each GPU, or `auto` from the topology: tries redundancies up to it."
)
@click.option("--plot", type=FILE, help="Gain against memory as PNG; needs --memory-gb.")
@seed_option
@click.option("--out", type=FILE, help="Write the recommendation as JSON.")
def recommend_command(
    trace: Path | None, dumps: tuple[Path, ...], test_trace: Path | None, dense_layers: int,
    topology: str, gpus: int | None,
    phases: tuple[Phase, ...], pass_tokens: int | None, rules: tuple[DispatchRule, ...], min_gain: float, layers: int,
    resamples: int, memory_gb: str | None, plot: Path | None,
    seed: int, out: Path | None,
) -> None:  # fmt: skip
    """Algorithm, redundant experts, DeepEP mode and interval for your traffic, with the predicted gain; or "leave it".

    \b
    Example:
      python -m sglang_eplb_affinity recommend --trace recorded.npz --topology my_cluster.yaml
    """
    if min_gain < 0:
        raise InputError(f"--min-gain {min_gain}: must be 0 or more")
    system = configured(topology, None, None, None)
    if gpus is not None:
        system = system.resized(gpus)
    for path in (out, plot):
        if path is not None:
            check_output(path, standard_output=False)
    check_png(plot, "--plot")
    if plot is not None and memory_gb is None:
        raise InputError(f"--plot {plot}: needs --memory-gb")
    tried = None if memory_gb is None else memory.redundancies(system, _gigabytes(memory_gb, system))
    test = None if test_trace is None else RoutingTrace.load(test_trace)
    source = RoutingSource(
        load_recording(trace, dumps, dense_layers), test, system.model, sampled_layers(system.model, layers), seed=seed
    )
    domains = source.trace.domain
    drifts = domains is not None and len(np.unique(domains)) > 1
    of_day = DAY_WINDOWS if drifts else 0
    serving = system.serving
    usual = {"prefill": serving.prefill_tokens_per_gpu, "decode": serving.decode_batch_per_gpu}
    tokens_of = {phase: pass_tokens or usual[phase] for phase in phases}
    total = sum(candidate_runs(system, phase, tokens_of[phase], resamples, tried, rules) + of_day for phase in phases)
    compares_v2 = "decode" in phases and system.serving.decode_mode != "v2"
    total += comparison_runs(system, tokens_of["decode"], resamples, tried) if compares_v2 else 0
    answers: list[tuple[Recommendation, DayResult | None]] = []
    with_v2: V2Comparison | None = None
    rows: dict[str, list[memory.MemoryRow]] = {}
    with progress(total, "comparing") as done:
        for phase in phases:
            tokens = tokens_of[phase]
            candidates = evaluate_candidates(system, source, phase, tokens, resamples, done, tried, rules)
            if tried is not None:
                rows[phase] = memory.memory_rows(system, candidates)
                within = next(row.redundant for row in rows[phase] if row.knee)
                candidates = [c for c in candidates if c.result.redundant <= within or c.result.algorithm != "affinity"]
            answer = decide(phase, candidates, min_gain)
            day = None
            if drifts and answer.enable:
                day = recommend_interval(system, source, answer, tokens, done)
            answers.append((answer, day))
            if phase == "decode" and compares_v2:
                with_v2 = compare_v2(system, source, answer.chosen, tokens, resamples, done, tried)
    head = report.header(system, source.label, command_line())
    if out is not None:
        entries = [_entry(answer, day) for answer, day in answers]
        table = {phase: [row.to_json() for row in found] for phase, found in rows.items()}
        if with_v2 is not None:
            entries[phases.index("decode")]["deepep_v2"] = with_v2.to_json()
        full = {**head, "recommendations": entries, **({"memory": table} if rows else {})}
        write_atomically(out, (json.dumps(full, indent=1) + "\n").encode())
    if plot is not None:
        memory.plot_memory(rows, f"{system.name}, {system.cluster.gpus} GPUs", plot)
    click.echo(f"SIMULATED. {system.name}, {system.cluster.gpus} GPUs. Routing: {source.label}.")
    for answer, day in answers:
        click.echo(_text(system, answer, day, drifts))
        if answer.phase == "decode" and with_v2 is not None:
            click.echo(f"  - {with_v2.text}")
        if answer.phase in rows:
            click.echo(
                "  affinity by memory for experts; the knee is taken:\n" + memory.memory_table(rows[answer.phase])
            )


def _gigabytes(text: str, system: System) -> float:
    if text == "auto":
        return memory.free_for_experts_gb(system)
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"--memory-gb {text}: must be GB above 0, or auto")
    return value


def _entry(answer: Recommendation, day: DayResult | None) -> dict[str, Any]:
    entry = answer.to_json()
    entry["rebalance"] = None if day is None else {"every": interval_text(day), "passes": interval_passes(day)}
    return entry


def _text(system: System, answer: Recommendation, day: DayResult | None, drifts: bool) -> str:
    chosen = answer.chosen.result
    lines = [f"\n{answer.phase}:", f"  judged on passes of {chosen.tokens_per_gpu} tokens a GPU"]
    if answer.enable:
        further = f" with --eplb-affinity-further-slots {chosen.further_slots}" if chosen.further_slots else ""
        gigabytes = memory.expert_gb(system, chosen.redundant) - memory.expert_gb(system, 0)
        lines.append(
            f"  use {chosen.algorithm} with {chosen.redundant} redundant experts ({gigabytes:.1f} GB on each GPU), "
            f"dispatch rule {chosen.dispatch_rule}{further}, DeepEP {chosen.mode}"
        )
        lines.append(f"  predicted gain over no EPLB: {_gain(answer.over_none)}")
        if answer.over_eplb is not None:
            lines.append(f"  predicted gain over EPLB: {_gain(answer.over_eplb)}")
        if day is not None:
            passes = interval_passes(day)
            flag = f" (--eplb-rebalance-num-iterations {passes})" if passes else ""
            lines.append(
                f"  rebalance {'every ' if passes else ''}{interval_text(day)}{flag}, for domains that drift over a day"
            )
        elif not drifts:
            lines.append("  interval: the recording has fewer than two domains; record over a day to choose it")
    else:
        lines.append(f"  do not enable it; DeepEP {chosen.mode}")
    return "\n".join([*lines, *(f"  - {reason}" for reason in answer.reasons)])


def _gain(interval: Interval) -> str:
    return f"{interval.value:+.1f} % [{interval.lower:+.1f}, {interval.upper:+.1f}]"
