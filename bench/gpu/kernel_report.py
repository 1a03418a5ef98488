"""What kernel_times.py measured, in ratios: to SGLang's paths and to an empty launch; and as summary entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang_eplb_affinity.dispatch.rules import KERNEL_RULES


def ratios(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Largest ratios of medians: to SGLang (`cover` to its `dynamic`), and to an empty launch up to 128 tokens."""

    def largest(ours: str, other: str, mode: str, most_tokens: int) -> float | None:
        found = [cell["us"] for cell in cells if cell["tokens"] <= most_tokens]
        return max((round(us[ours][mode]["median"] / us[other][mode]["median"], 3) for us in found), default=None)

    pairs = (
        ("ours_dynamic", "upstream_dynamic"),
        ("ours_static", "upstream_static"),
        ("ours_cover", "upstream_dynamic"),
        ("ours_cover_balanced", "upstream_dynamic"),
    )
    modes = ("graph", "eager")
    return {
        "to_upstream": {f"{a} / {b}": {mode: largest(a, b, mode, 1 << 30) for mode in modes} for a, b in pairs},
        "balanced_to_cover": {
            str(most): {mode: largest("ours_cover_balanced", "ours_cover", mode, most) for mode in modes}
            for most in (128, 1 << 30)
        },
        "to_empty_up_to_128_tokens": {a: {mode: largest(a, "empty", mode, 128) for mode in modes} for a, _ in pairs},
    }


def entries(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Summary entries: the largest ratios of all sizes, and those of single rules."""
    source = result["provenance"]
    common = {
        "kind": "measured",
        **{key: source[key] for key in ("hardware", "versions", "commit")},
        "date": result["date"],
        "command": "python -m bench.gpu.kernel_times --out FILE",
    }
    to_upstream, to_empty = result["ratios"]["to_upstream"], result["ratios"]["to_empty_up_to_128_tokens"]
    found = []

    def add(name: str, value: float | None, unit: str) -> None:
        if value is not None:
            found.append({"name": name, "value": value, "lower": value, "upper": value, "unit": unit, **common})

    everything = {(pair, mode): ratio for pair, modes in to_upstream.items() for mode, ratio in modes.items()}
    pair, mode = max(everything, key=lambda key: everything[key] or 0)
    where = f"{pair}, {'in a graph' if mode == 'graph' else 'launched one by one'}"
    add("kernel.time_ratio_to_upstream.max", everything[pair, mode], f"ratio to SGLang's path, largest: {where}")
    for mode, name in (("graph", "time"), ("eager", "eager_time")):
        ratio = to_upstream["ours_static / upstream_static"][mode]
        add(f"kernel.static.{name}_ratio_to_upstream.max", ratio, "ratio to SGLang's path (static), largest over sizes")
    ratio = to_upstream["ours_cover_balanced / upstream_dynamic"]["graph"]
    add(
        "kernel.cover_balanced.time_ratio_to_upstream.max",
        ratio,
        "largest ratio to SGLang's path (dynamic), in a graph",
    )
    lp = [
        us["ours_cover_balanced"]["graph"]["median"] / us["upstream_lp"]["graph"]["median"]
        for us in (cell["us"] for cell in result["cells"])
        if "upstream_lp" in us
    ]
    if lp:
        unit = "largest ratio to SGLang's lp without its all-reduce, in a graph"
        add("kernel.cover_balanced.time_ratio_to_lp.max", round(max(lp), 4), unit)
    for rule in KERNEL_RULES:
        ratio = to_empty[f"ours_{rule}"]["graph"]
        add(f"kernel.{rule}.time_ratio_to_empty.max", ratio, "ratio to an empty kernel in a graph, up to 128 tokens")
    return found
