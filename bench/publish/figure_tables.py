"""Markdown tables of summary entries: rows of equal metrics as one grid, all others as a list."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.publish.catalogue import catalogue
from bench.publish.summary import Figure

Marks = Callable[[Sequence[Figure]], str]
"""What stands behind a row's title, such as the numbers of its footnotes."""


def figure_tables(figures: Sequence[Figure], drop: Sequence[str], marks: Marks = lambda _: "") -> list[str]:
    """One table for each group of rows ROW.METRIC with the same metrics, and one list of the rest.

    ``drop``: parts of names that need not be said, since the title above says them.
    """
    grids = _grids(figures)
    in_grids = {figure.name for grid in grids for row in grid for figure in row}
    rest = [figure for figure in figures if figure.name not in in_grids]
    tables = [_grid_table(grid, drop, marks) for grid in grids]
    return tables + ([_list_table(rest, drop, marks)] if rest else [])


def _grids(figures: Sequence[Figure]) -> list[list[list[Figure]]]:
    """Rows `HEAD.ROW` that belong in one table: two at least with the same metrics, and those with some of them."""
    heads: dict[str, dict[str, list[Figure]]] = {}
    for figure in figures:
        row = figure.name.rpartition(".")[0]
        heads.setdefault(row.rpartition(".")[0], {}).setdefault(row, []).append(figure)
    grids = []
    for rows in heads.values():
        fullest = max(rows.values(), key=len)
        columns = {_metric(figure) for figure in fullest}
        grid = [row for row in rows.values() if {_metric(figure) for figure in row} <= columns]
        if sum(len(row) == len(fullest) for row in grid) > 1:
            grids.append(grid)
    return grids


def _metric(figure: Figure) -> tuple[str, str]:
    return figure.name.rpartition(".")[2], figure.unit


def _grid_table(grid: Sequence[Sequence[Figure]], drop: Sequence[str], marks: Marks) -> str:
    columns = [_metric(figure) for figure in max(grid, key=len)]
    titles = [catalogue().label([name]) for name, _ in columns]
    lines = ["| | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(columns)]
    for row in grid:
        cells = {_metric(figure): number_with_interval(figure) + _kind(figure) for figure in row}
        title = _label(row[0].name.rpartition(".")[0], drop) + marks(row)
        lines.append(f"| {title} | " + " | ".join(cells.get(column, "") for column in columns) + " |")
    return "\n".join(lines)


def _list_table(figures: Sequence[Figure], drop: Sequence[str], marks: Marks) -> str:
    lines = ["| | | unit |", "|---|---:|---|"]
    for figure in figures:
        title = _label(figure.name, drop) + marks([figure])
        unit = figure.unit.replace("|", "\\|")
        lines.append(f"| {title} | {number_with_interval(figure)}{_kind(figure)} | {unit} |")
    return "\n".join(lines)


def _label(name: str, drop: Sequence[str]) -> str:
    parts = name.split(".")
    return catalogue().label([part for part in parts if part not in drop] or parts[-1:])


def _kind(figure: Figure) -> str:
    return f", *{figure.kind}*" if figure.kind != "measured" else ""


def number_with_interval(figure: Figure) -> str:
    if figure.lower == figure.upper:
        return number(figure.value)
    return f"{number(figure.value)} ({number(figure.lower)} to {number(figure.upper)})"


def number(value: float) -> str:
    """Four significant digits, without an exponent for the sizes that occur here."""
    if value == int(value) and abs(value) < 1e4:
        return str(int(value))
    if 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.2e}"
