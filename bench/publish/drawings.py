"""The README's two pictures: a token's experts under two placements, and the figures of its table with intervals."""

from __future__ import annotations

import contextlib
import io
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from bench.harness.engine import ROOT
from bench.publish import svg
from bench.publish.headline_table import headline_rows, signed
from bench.publish.summary import Figure
from sglang_eplb_affinity.dispatch.evaluate import NO_PASS_LOAD, ONE_PASS, measure_layer
from sglang_eplb_affinity.dispatch.rules import DispatchRule, RuleNumber
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology

EXAMPLE = ROOT / "bench" / "examples" / "twelve_experts.py"
TOKEN = (1, 5, 6, 10)  # the experts of the second theme
_COLORS = {"emulated": svg.ORANGE, "measured": svg.BLUE, "simulated": svg.GREY}


@dataclass(frozen=True)
class Example:
    """What the example printed, and its names."""

    output: str
    names: dict[str, Any]


@cache
def example() -> Example:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        names = runpy.run_path(str(EXAMPLE))
    return Example(out.getvalue(), names)


def token_drawing() -> str:
    """One token of the example under EPLB's placement and affinity's, each with the rule that it is served with."""
    names = example().names
    width, height = 860, 270
    parts = [svg.line(width / 2, 20, width / 2, height - 20, svg.PALE, 2)]
    halves: tuple[tuple[float, str, ExpertMap, DispatchRule], ...] = (
        (0, "EPLB", names["eplb"], "static"),
        (width / 2, "affinity", names["affinity"], "cover"),
    )
    for left, title, placed, rule in halves:
        slots = _slots_of_token(placed, names["gpus"], rule)
        parts += _placement(left, width / 2, title, placed.physical_to_logical[0], slots)
    title = "A token's four experts on 4 GPUs under EPLB's placement and under affinity's"
    return svg.document(width, height, title, parts)


def _slots_of_token(placed: ExpertMap, gpus: Topology, rule: DispatchRule) -> list[int]:
    """The slots that serve TOKEN, which comes from GPU 0."""
    tokens, chosen = np.array([TOKEN], np.int16), np.full((1, len(TOKEN)), -1, np.int16)
    measure_layer(
        tokens, np.zeros(1, np.int32), placed.logical_to_all_physical()[0], placed.replica_counts()[0],
        gpus.slots_per_gpu(placed.num_slots), gpus.gpus_per_node, gpus.num_nodes, int(RuleNumber.of(rule)),
        np.zeros(5, np.int64), np.zeros(placed.num_slots, np.int64), chosen, ONE_PASS, NO_PASS_LOAD,
    )  # fmt: skip
    return [int(slot) for slot in chosen[0]]


def _placement(left: float, width: float, title: str, experts: np.ndarray, used: Sequence[int]) -> list[str]:
    """One half of the drawing: the token above, its GPUs below, the slots that serve it filled."""
    visited = sorted({slot // 4 for slot in used})
    middle, top, size, gap = left + width / 2, 160, 86, 14
    start = middle - (4 * size + 3 * gap) / 2
    parts = [
        svg.text(middle, 32, f"{title}: {len(visited)} of 4 GPUs", 17, anchor="middle", bold=True),
    ]
    for gpu in visited:
        parts.append(svg.line(middle, 74, start + gpu * (size + gap) + size / 2, top - 22, svg.BLUE, 2))
    parts += [
        svg.box(middle - 108, 50, 216, 28, svg.BLUE),
        svg.text(middle, 69, f"token: experts {', '.join(map(str, TOKEN))}", 14, "#ffffff", "middle"),
    ]
    for gpu in range(4):
        x = start + gpu * (size + gap)
        parts.append(
            svg.text(x + size / 2, top - 7, f"GPU {gpu}", 13, svg.INK if gpu in visited else svg.GREY, "middle")
        )
        parts.append(svg.box(x, top, size, size, svg.PALE, svg.BLUE if gpu in visited else svg.GREY))
        for place in range(4):
            slot, half = 4 * gpu + place, size / 2
            x_slot, y_slot = x + place % 2 * half + 5, top + place // 2 * half + 5
            serves = slot in used
            parts.append(
                svg.box(x_slot, y_slot, half - 10, half - 10, svg.BLUE if serves else "#ffffff", svg.GREY, 0.6)
            )
            color = "#ffffff" if serves else svg.INK
            parts.append(svg.text(x_slot + half / 2 - 5, y_slot + half / 2, str(experts[slot]), 14, color, "middle"))
    return parts


def gains_drawing(figures: Sequence[Figure]) -> str:
    """The rows of the README's table as points with intervals; left of the line is shorter than SGLang's EPLB."""
    rows = headline_rows(figures)
    row_height, top, left, right, width = 28, 44, 595, 20, 1010  # 76 characters of a wide font fit
    height = top + row_height * len(rows) + 44
    low = min([-5.0, *(row.lower for row in rows)])
    high = max([5.0, *(row.upper for row in rows)])
    scale = (width - left - right - 20) / (high - low)

    def x_of(value: float) -> float:
        return left + 10 + (value - low) * scale

    parts = [
        svg.text(x_of(0) - 8, 24, "shorter", 13, svg.GREEN, "end"),
        svg.text(x_of(0) + 8, 24, "longer", 13, svg.ORANGE),
    ]
    step = 5 if high - low <= 60 else 20
    for tick in range(int(np.ceil(low / step)) * step, int(high) + 1, step):
        parts.append(svg.line(x_of(tick), top - 10, x_of(tick), height - 40, svg.INK if tick == 0 else svg.PALE, 1.2))
        parts.append(
            svg.text(x_of(tick), height - 24, signed(tick).removesuffix(".0") if tick else "0", 12, svg.GREY, "middle")
        )
    parts.append(svg.text(x_of(0), height - 7, "% of the time under SGLang's EPLB", 12, svg.GREY, "middle"))
    for number, row in enumerate(rows):
        y, color = top + row_height * number + row_height / 2 - 4, _COLORS[row.kind]
        parts.append(svg.text(left - 84, y + 4, row.label.replace("`", ""), 12, svg.INK, "end"))
        parts.append(svg.text(left - 76, y + 4, row.kind, 12, color, "start", row.verdict == 0))
        parts.append(svg.line(x_of(row.lower), y, x_of(row.upper), y, color, 3))
        parts.append(svg.circle(x_of(row.change), y, 5.5, color))
    return svg.document(width, height, "Times against SGLang's EPLB, with intervals", parts)
