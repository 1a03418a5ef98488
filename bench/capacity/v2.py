"""Simulated decode with DeepEP V2 beside V1's low-latency mode, for the presets, on held-out tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.simulate.memory import expert_gb
from sglang_eplb_affinity.simulate.scenario import Algorithm, Interval, Phase, PhaseResult, simulate
from sglang_eplb_affinity.simulate.source import RoutingSource, sampled_layers
from sglang_eplb_affinity.simulate.system import DeepEPMode, System, load_system

LAYERS, RESAMPLES = 2, 4
HEADLINE = "simulate.v2.deepseek_v3_ep32.decode_gain_pct"
V2_MEASURED = "results/deepep/h200-x2-v2.json"
# Preset, GPUs, redundant experts to choose from, for both algorithms alike.
RUNS: tuple[tuple[str, int, tuple[int, ...]], ...] = (
    ("deepseek-v3-h200", 32, (0, 32, 256)),
    ("deepseek-v3-h200", 8, (0, 32, 64)),
    ("deepseek-v3-h800", 144, (32, 176)),
    ("deepseek-v3-gb200-nvl72", 72, (32, 248)),
    ("qwen3-235b-h200", 16, (0, 16, 128)),
    ("gpt-oss-120b-h200", 8, (0, 8, 64)),
)


def v2_rows(
    plan: RoutingTrace, test: RoutingTrace, done: Callable[[dict[str, Any]], object] = lambda _: None
) -> list[dict[str, Any]]:
    """One row per run, each algorithm at its best redundancy: steps in ms, gains in % of a step, fan-outs, load.

    ``gain``: affinity's over EPLB, both with V2. ``V2 over V1, EPLB``: EPLB with V2 over EPLB with V1. ``done`` is
    called with each row.
    """
    rows = []
    for preset, gpus, redundancies in RUNS:
        system = load_system(preset)
        layers = sampled_layers(system.model, LAYERS)
        source = RoutingSource(plan, test, system.model, layers)

        sizes = [system.resized(gpus, redundant) for redundant in redundancies]
        v1_eplb, v1 = _best(sizes, source, "low_latency", "eplb"), _best(sizes, source, "low_latency", "affinity")
        eplb, ours = _best(sizes, source, "v2", "eplb"), _best(sizes, source, "v2", "affinity")
        gain, change, both = _gain(ours, eplb), _gain(eplb, v1_eplb), _gain(ours, v1_eplb)
        rows.append({
            "preset": preset, "GPUs": gpus, "batch": ours.tokens_per_gpu, "V1 EPLB ms": v1_eplb.step_ms.value,
            "V1 affinity gain %": _gain(v1, v1_eplb).value, "V2 EPLB ms": eplb.step_ms.value,
            "V2 affinity ms": ours.step_ms.value, "gain %": gain.value, "lower": gain.lower, "upper": gain.upper,
            "V2 over V1, EPLB %": change.value, "V2 affinity over V1 EPLB %": both.value,
            "EPLB redundant": eplb.redundant, "redundant": ours.redundant,
            "V1 affinity redundant": v1.redundant, "V1 rule": v1.dispatch_rule, "rule": ours.dispatch_rule,
            "EPLB GPU fan-out": eplb.gpu_fanout, "GPU fan-out": ours.gpu_fanout,
            "EPLB node fan-out": eplb.node_fanout, "node fan-out": ours.node_fanout,
            "EPLB load": eplb.load_max_over_mean, "load": ours.load_max_over_mean,
            "EPLB active slots": eplb.active_slots, "active slots": ours.active_slots,
            "GB of experts a GPU": expert_gb(system.resized(gpus, ours.redundant), ours.redundant),
        })  # fmt: skip
        done(rows[-1])
    return rows


def fanout_ratio(data: dict[str, Any]) -> dict[str, Any]:
    """Summary entry: dispatch and combine in a graph where tokens visit one of two GPUs, over both; 128 tokens a GPU.

    ``data``: a result of `python -m bench.micro.deepep --sections v2`. The bounds are those of its repeats.
    """
    where = {"mode": "v2_graph", "hidden": 7168, "dtype": "fp8", "tokens": 128}
    one, both = (
        next(row for row in data["sections"]["v2"]["rows"] if row.items() >= {**where, "routing": routing}.items())
        for routing in ("spread", "2")
    )
    a, b = one["round_trip_us"], both["round_trip_us"]
    return {
        "name": "deepep_v2.decode.ratio_fanout1_to_2.128", "value": a["median"] / b["median"],
        "lower": a["repeat_min"] / b["repeat_max"], "upper": a["repeat_max"] / b["repeat_min"],
        "unit": "ratio", "kind": "measured", "hardware": data["hardware"], "versions": data["versions"],
        "commit": data["commit"], "date": data["date"], "command": data["command"],
    }  # fmt: skip


def v2_table(rows: list[dict[str, Any]]) -> str:
    """Markdown for docs/capacity_results.md."""
    columns = (
        "cluster", "requests/GPU", "V1: EPLB, step ms", "V1: affinity over EPLB", "V2: EPLB, step ms",
        "V2: affinity over EPLB", "V2 instead of V1, EPLB both", "redundant (EPLB, affinity)",
        "V2's GPU / node fan-out (EPLB to affinity)", "load (EPLB to affinity)",
        "active slots (EPLB to affinity)",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for r in rows:
        cells = (
            f"{r['preset']}, {r['GPUs']} GPUs", str(r["batch"]), f"{r['V1 EPLB ms']:.1f}",
            f"{r['V1 affinity gain %']:+.1f} %, `{r['V1 rule']}`", f"{r['V2 EPLB ms']:.1f}",
            f"{r['gain %']:+.1f} % [{r['lower']:+.1f}, {r['upper']:+.1f}], `{r['rule']}`",
            f"{r['V2 over V1, EPLB %']:+.1f} %",
            f"{r['EPLB redundant']}, {r['redundant']}",
            f"{r['EPLB GPU fan-out']:.2f} to {r['GPU fan-out']:.2f} / {r['EPLB node fan-out']:.2f} to "
            f"{r['node fan-out']:.2f}",
            f"{r['EPLB load']:.2f} to {r['load']:.2f}", f"{r['EPLB active slots']:.1f} to {r['active slots']:.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best(sizes: Sequence[System], source: RoutingSource, mode: DeepEPMode, algorithm: Algorithm) -> PhaseResult:
    """The result with the shortest decode step among ``sizes``, one system with several redundancies."""
    found = []
    for system in sizes:
        serving = dataclasses.replace(system.serving, decode_mode=mode, overlap="none")
        runs: list[tuple[Phase, int]] = [("decode", serving.decode_batch_per_gpu)]
        chosen = dataclasses.replace(system, serving=serving)
        found += simulate(chosen, source, runs, [algorithm], resamples=RESAMPLES)
    return min(found, key=lambda result: result.step_ms.value)


def _gain(result: PhaseResult, baseline: PhaseResult) -> Interval:
    return Interval.of(100 * (1 - np.array(result.step_ms_samples) / np.array(baseline.step_ms_samples)))
