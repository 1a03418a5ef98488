"""The result tables of a Markdown file, made from results/summary.json between markers.

``<!-- results:begin NAME -->`` and ``<!-- results:end NAME -->`` enclose one table. NAME is a prefix of entry
names: `bench.cpu` takes `bench.cpu.qps...` and all others below it; several are separated by commas; `all` takes every
entry.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.publish.summary import Figure
from sglang_eplb_affinity.domain.errors import InputError

_BLOCK = re.compile(
    r"(?P<begin><!-- results:begin (?P<name>[\w.,-]+) -->\n)(?P<body>.*?)(?P<end><!-- results:end (?P=name) -->)",
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
    """Markdown tables of the entries below ``prefix`` (or several, with commas); what was not measured says so.

    Entries `HEAD.ROW.METRIC` of which several rows have the same metrics make one table, a row each; all others are
    lines of a list. Empty when there is no such entry.
    """
    wanted = prefix.split(",")
    chosen = [f for f in figures if prefix == "all" or any(f"{f.name}.".startswith(f"{name}.") for name in wanted)]
    if not chosen:
        return ""
    chosen.sort(key=lambda figure: figure.name)
    grids = _grids(chosen)
    in_grids = {f.name for grid in grids for row in grid for f in row}
    rest = [f for f in chosen if f.name not in in_grids]
    parts = [_grid_table(grid) for grid in grids] + ([_list_table(rest)] if rest else [])
    return "\n\n".join([*parts, "\n".join(_sources(chosen))]) + "\n"


def _grids(figures: Sequence[Figure]) -> list[list[list[Figure]]]:
    """Rows of figures that belong in one table: two rows at least with the same metrics, and rows with some of them."""
    heads: dict[str, dict[str, list[Figure]]] = {}
    for figure in figures:
        head, row = _row_name(figure)
        heads.setdefault(head, {}).setdefault(row, []).append(figure)
    grids = []
    for rows in heads.values():
        fullest = max(rows.values(), key=len)
        columns = {_column(f) for f in fullest}
        grid = [row for row in rows.values() if {_column(f) for f in row} <= columns]
        if sum(len(row) == len(fullest) for row in grid) > 1:
            grids.append(grid)
    return grids


def _column(figure: Figure) -> str:
    return f"{_metric(figure)} ({figure.unit})"


def _metric(figure: Figure) -> str:
    return figure.name.rpartition(".")[2]


def _row_name(figure: Figure) -> tuple[str, str]:
    """(head, row) of a name `HEAD.ROW.METRIC`."""
    head, _, row = figure.name.rpartition(".")[0].rpartition(".")
    return head, row


def _grid_table(grid: Sequence[Sequence[Figure]]) -> str:
    columns = [_column(f) for f in max(grid, key=len)]
    lines = [f"| `{_row_name(grid[0][0])[0]}` | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in grid:
        cells = {_column(f): _cell(f) for f in row}
        lines.append(f"| `{_row_name(row[0])[1]}` | " + " | ".join(cells.get(column, "") for column in columns) + " |")
    return "\n".join(lines)


def _cell(figure: Figure) -> str:
    interval = f" ({_interval(figure)})" if figure.lower != figure.upper else ""
    return _number(figure.value) + interval + (f", {figure.kind}" if figure.kind != "measured" else "")


def _list_table(figures: Sequence[Figure]) -> str:
    lines = ["| figure | value | interval | kind |", "|---|---:|---:|---|"]
    for f in figures:
        interval = _interval(f) if f.lower != f.upper else ""
        cells = [f"`{f.name}`", f"{_number(f.value)} {f.unit}".strip(), interval, f.kind]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _interval(figure: Figure) -> str:
    return f"{_number(figure.lower)} to {_number(figure.upper)}"


def _sources(figures: Sequence[Figure]) -> list[str]:
    """One line for each command, hardware, date and commit that figures come from."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for f in figures:
        found.setdefault((f.command, f.hardware, f.date[:10], f.commit[:8]), []).append(f.name)
    lines = []
    for (command, hardware, date, commit), names in found.items():
        of = "" if len(found) == 1 else f" ({', '.join(f'`{name}`' for name in names)})"
        lines.append(f"With `{command}` on {hardware}, {date}, commit `{commit}`{of}.")
    return lines if len(lines) == 1 else [f"- {line}" for line in lines]


def _number(value: float) -> str:
    """Four significant digits, without an exponent for the sizes that occur here."""
    return (
        f"{value:.4g}"
        if 1e-4 <= abs(value) < 1e4 or value == 0
        else f"{value:,.0f}"
        if abs(value) >= 1e4
        else f"{value:.2e}"
    )
