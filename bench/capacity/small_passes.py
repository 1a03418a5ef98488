"""Simulated decode within a node, in DeepEP's low-latency mode: one active slot an expert beside all slots, by the size
of a pass, whatever size a server would end the former at. What ``dispatch/small_passes.py`` was chosen by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sglang_eplb_affinity.dispatch.small_passes import most_tokens
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.simulate.scenario import Phase, simulate
from sglang_eplb_affinity.simulate.source import RoutingSource, sampled_layers
from sglang_eplb_affinity.simulate.system import load_system

LAYERS, RESAMPLES = 2, 4
ROWS = (8, 16, 32, 64, 96)  # of a primary slot on average
# Preset, GPUs, redundant experts.
RUNS: tuple[tuple[str, int, tuple[int, ...]], ...] = (
    ("deepseek-v3-h200", 8, (16, 32, 64, 128, 256)),
    ("qwen3-235b-h200", 8, (16, 32, 64, 128)),
    ("gpt-oss-120b-h200", 8, (16, 32, 64, 128)),
    ("deepseek-v3-gb200-nvl72", 16, (32, 64, 128)),
    ("deepseek-v3-gb200-nvl72", 32, (32, 64, 128)),
    ("deepseek-v3-gb200-nvl72", 72, (32, 104)),
)


def size_rows(
    plan: RoutingTrace, test: RoutingTrace, done: Callable[[dict[str, Any]], object] = lambda _: None
) -> list[dict[str, Any]]:
    """One row per cluster, redundancy and size of a pass. ``ratio``: of a step under ``primary`` to ``static``'s, on
    maps planned for each; ``small``: whether servers take a pass of so many tokens for small."""
    found = []
    for preset, gpus, redundancies in RUNS:
        system = load_system(preset)
        layers = sampled_layers(system.model, LAYERS)
        source = RoutingSource(plan, test, system.model, layers)
        per_row = system.model.experts / (gpus * system.model.top_k)
        tokens = dict.fromkeys(max(1, round(rows * per_row)) for rows in ROWS)
        phases: list[tuple[Phase, int]] = [("decode", count) for count in tokens]
        for redundant in redundancies:
            sized = system.resized(gpus, redundant)
            results = simulate(
                sized, source, phases, ["affinity"], resamples=RESAMPLES, rules=("static", "primary"), as_asked=True
            )
            most = most_tokens(system.model.experts, redundant, system.model.top_k, gpus, True)
            for static, primary in zip(results[::2], results[1::2], strict=True):
                count = static.tokens_per_gpu
                found.append({
                    "preset": preset, "GPUs": gpus, "experts/GPU": system.model.experts / gpus,
                    "redundant/GPU": redundant / gpus, "tokens/GPU": count, "rows": count / per_row,
                    "ratio": primary.step_ms.value / static.step_ms.value, "small": count <= most,
                    "static ms": static.step_ms.value, "primary ms": primary.step_ms.value,
                    "static load": static.load_max_over_mean, "primary load": primary.load_max_over_mean,
                })  # fmt: skip
                done(found[-1])
    return found


def size_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown for docs/capacity_results.md: ratios, those of small passes in bold."""
    head = ("cluster", "experts a GPU", "redundant a GPU", *(f"{count} rows" for count in ROWS))
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    keys = ("preset", "GPUs", "experts/GPU", "redundant/GPU")
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        of_key = [row for row in rows if tuple(row[k] for k in keys) == key]
        cells = [f"{key[0]}, {key[1]} GPUs", f"{key[2]:.3g}", f"{key[3]:.3g}"]
        for row in of_key:
            mark = "**" if row["small"] else ""
            cells.append(f"{mark}{row['ratio']:.3f}{mark}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
