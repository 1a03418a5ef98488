"""The result tables of a Markdown file, made from results/summary.json between markers.

``<!-- results:begin NAME -->`` and ``<!-- results:end NAME -->`` enclose one table. NAME is a prefix of entry
names: `bench.cpu` takes `bench.cpu.qps...` and all others below it; `all` takes every entry.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.summary import Figure
from sglang_eplb_affinity.errors import InputError

_BLOCK = re.compile(
    r"(?P<begin><!-- results:begin (?P<name>[\w.-]+) -->\n)(?P<body>.*?)(?P<end><!-- results:end (?P=name) -->)",
    re.DOTALL,
)
_MARKER = re.compile(r"<!-- results:(?:begin|end) [^>]*-->")


def update_tables(text: str, figures: Sequence[Figure], source: str = "README.md") -> str:
    """``text`` with every marked table made anew; raises InputError for a marker without its partner."""
    blocks = list(_BLOCK.finditer(text))
    if len(_MARKER.findall(text)) != 2 * len(blocks):
        raise InputError(f"{source}: a `results:begin NAME` marker has no `results:end NAME` of the same name")
    return _BLOCK.sub(lambda m: m["begin"] + results_table(figures, m["name"]) + m["end"], text)


def results_table(figures: Sequence[Figure], prefix: str) -> str:
    """Markdown table of the entries below ``prefix``; the kind is in every line, so nothing passes for measured.

    Empty when there is no such entry.
    """
    chosen = [f for f in figures if prefix == "all" or f.name == prefix or f.name.startswith(prefix + ".")]
    if not chosen:
        return ""
    lines = ["| figure | value | interval | kind | hardware | date | commit |", "|---|---:|---:|---|---|---|---|"]
    for f in sorted(chosen, key=lambda figure: figure.name):
        value = f"{_number(f.value)} {f.unit}".strip()
        interval = f"{_number(f.lower)} to {_number(f.upper)}" if f.lower != f.upper else ""
        cells = [f"`{f.name}`", value, interval, f.kind, f.hardware, f.date[:10], f"`{f.commit[:8]}`"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    commands = sorted({f.command for f in chosen})
    return "\n".join([*lines, "", "Measured with: " + ", ".join(f"`{command}`" for command in commands)]) + "\n"


def _number(value: float) -> str:
    """Four significant digits, without an exponent for the sizes that occur here."""
    return (
        f"{value:.4g}"
        if 1e-4 <= abs(value) < 1e4 or value == 0
        else f"{value:,.0f}"
        if abs(value) >= 1e4
        else f"{value:.2e}"
    )
