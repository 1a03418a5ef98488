"""Simulated decode in DeepEP's low-latency mode: replica choices and redundancies beside EPLB, on held-out tokens.

What a step costs beside the links are the active slots of the busiest GPU: those that have a token in the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.simulate.scenario import Phase, PhaseResult, gain_pct, simulate
from sglang_eplb_affinity.simulate.source import RoutingSource, sampled_layers
from sglang_eplb_affinity.simulate.system import load_system

LAYERS, RESAMPLES = 2, 4
BATCHES = (32, 128)
RULES: tuple[DispatchRule, ...] = ("static", "cover", "primary")
# Preset, GPUs, redundant experts: of every algorithm, and of EPLB alone, whose best is sought among both.
RUNS: tuple[tuple[str, int, tuple[int, ...], tuple[int, ...]], ...] = (
    ("deepseek-v3-h200", 8, (32, 64), (0,)),
    ("deepseek-v3-h200", 32, (32, 256), (0, 64)),
    ("deepseek-v3-gb200-nvl72", 72, (32,), ()),
    ("qwen3-235b-h200", 16, (16, 128), (0, 32)),
    ("gpt-oss-120b-h200", 8, (8, 64), (0,)),
)
FURTHER = 1  # slots of a GPU that small passes use besides the primaries, over several nodes
_ARMS = (
    "contiguous map",
    "EPLB",
    *(f"affinity, `{rule}`" for rule in RULES),
    f"affinity, `primary`, {FURTHER} further",
)


def decode_rows(
    plan: RoutingTrace, test: RoutingTrace, done: Callable[[dict[str, Any]], object] = lambda _: None
) -> list[dict[str, Any]]:
    """One row per cluster, batch, redundancy and arm: step in ms, gains in % of a step, active slots, fan-outs, load.

    ``gain over EPLB %``: at the same redundancy; ``gain over best EPLB %``: at the one that serves the batch best.
    ``done`` is called with each row.
    """
    rows = []
    phases: list[tuple[Phase, int]] = [("decode", batch) for batch in BATCHES]
    for preset, gpus, redundancies, of_eplb in RUNS:
        system = load_system(preset)
        layers = sampled_layers(system.model, LAYERS)
        source = RoutingSource(plan, test, system.model, layers)
        source.batch = lru_cache(len(BATCHES) * RESAMPLES)(source.batch)  # type: ignore[assignment, method-assign]
        found: list[PhaseResult] = []
        for redundant in of_eplb:
            found += simulate(system.resized(gpus, redundant), source, phases, ["eplb"], resamples=RESAMPLES)
        for redundant in redundancies:
            sized = system.resized(gpus, redundant)
            # All slots of a GPU are `static`.
            further = (0, FURTHER) if sized.topology.num_nodes > 1 and redundant // gpus > FURTHER else (0,)
            found += simulate(
                sized, source, phases, ["none", "eplb", "affinity"], resamples=RESAMPLES,
                rules=RULES, further_slots=further,
            )  # fmt: skip
        for batch in BATCHES:
            of_batch = [result for result in found if result.tokens_per_gpu == batch]
            best = min((r for r in of_batch if r.algorithm == "eplb"), key=lambda result: result.step_ms.value)
            for redundant in redundancies:
                results = [r for r in of_batch if r.redundant == redundant]
                same = next(r for r in results if r.algorithm == "eplb")
                for arm, result in zip(_ARMS, results, strict=False):  # the last one only where there is a choice
                    rows.append({"preset": preset, **_row(arm, result, same, best)})
                    done(rows[-1])
    return rows


def _row(arm: str, result: PhaseResult, same: PhaseResult, best: PhaseResult) -> dict[str, Any]:
    over_same, over_best = gain_pct(result, same), gain_pct(result, best)
    return {
        "GPUs": result.gpus, "batch": result.tokens_per_gpu, "redundant": result.redundant, "arm": arm,
        "served rule": result.dispatch_rule, "step ms": result.step_ms.value, "active slots": result.active_slots,
        "dispatch us": result.dispatch_us.value, "experts us": result.experts_us.value,
        "combine us": result.combine_us.value,
        "gain over EPLB %": over_same.value, "lower": over_same.lower, "upper": over_same.upper,
        "best EPLB redundant": best.redundant, "best EPLB ms": best.step_ms.value,
        "best EPLB active slots": best.active_slots,
        "gain over best EPLB %": over_best.value, "best lower": over_best.lower, "best upper": over_best.upper,
        "GPU fan-out": result.gpu_fanout, "node fan-out": result.node_fanout, "load": result.load_max_over_mean,
    }  # fmt: skip


def decode_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown for docs/capacity_results.md: step in ms and active slots of the busiest GPU, the best in bold."""
    head = ("cluster", "requests/GPU", "redundant", *_ARMS, "EPLB at its best", "best of affinity over it")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    keys = ("preset", "GPUs", "batch", "redundant")
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        arms = [row for row in rows if tuple(row[k] for k in keys) == key]
        shortest = min(round(row["step ms"], 1) for row in arms)
        cells = [f"{key[0]}, {key[1]} GPUs", str(key[2]), str(key[3])]
        for row in arms:
            mark = "**" if round(row["step ms"], 1) == shortest else ""
            large = "`primary`" in row["arm"] and row["served rule"] != "primary"
            text = f"{mark}{row['step ms']:.1f}{mark} ms, {row['active slots']:.1f}"
            cells.append(text + (f" (as `{row['served rule']}`)" if large else ""))
        cells += [""] * (len(_ARMS) - len(arms))
        ours = min((row for row in arms if row["arm"].startswith("affinity")), key=lambda row: float(row["step ms"]))
        cells.append(
            f"{ours['best EPLB ms']:.1f} ms, {ours['best EPLB active slots']:.1f} (+{ours['best EPLB redundant']})"
        )
        gain = f"{ours['gain over best EPLB %']:+.1f} % [{ours['best lower']:+.1f}, {ours['best upper']:+.1f}]"
        cells.append(f"{gain}, {ours['arm'].removeprefix('affinity, ')}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
