"""The README's table: a few rows of the summary, the best proven gain first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.publish.catalogue import catalogue
from bench.publish.summary import Figure

_GAIN, _LOSS = ("gain_pct",), ("loss_pct",)


@dataclass(frozen=True)
class Row:
    """Change of a time against vanilla EPLB, per cent: below 0 is shorter. ``hardware``: short, `2 x H200`."""

    label: str
    change: float
    lower: float
    upper: float
    kind: str
    hardware: str

    @property
    def verdict(self) -> int:
        """0 proven gain, 1 not told from no difference, 2 proven loss."""
        return 0 if self.upper < 0 else 2 if self.lower > 0 else 1


def headline_rows(figures: Sequence[Figure]) -> list[Row]:
    """Rows of the catalogue that the summary has, simulated ones last; of each kind the proven gains by size, then what
    was not told apart from no difference, then losses."""
    named = {figure.name: figure for figure in figures}
    rows = []
    for headline in catalogue().headlines:
        figure = next((named[name] for name in headline.entries if name in named), None)
        if figure is not None:
            rows.append(_row(headline.label, figure))
    return sorted(rows, key=lambda row: (row.kind == "simulated", row.verdict, row.change))


def headline_table(figures: Sequence[Figure]) -> str:
    """Markdown; empty without rows."""
    lines = ["| what | time against SGLang's EPLB | interval | how it is known |", "|---|---:|---:|---|"]
    for row in headline_rows(figures):
        change = f"**{signed(row.change)} %**" if row.verdict == 0 else f"{signed(row.change)} %"
        interval = f"{signed(row.lower)} to {signed(row.upper)} %"
        cells = [row.label, change, interval, f"{row.kind}, {row.hardware}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _row(label: str, figure: Figure) -> Row:
    if figure.name.endswith(_GAIN):
        change, lower, upper = -figure.value, -figure.upper, -figure.lower
    elif figure.name.endswith(_LOSS):
        change, lower, upper = figure.value, figure.lower, figure.upper
    else:
        change, lower, upper = (100 * (x - 1) for x in (figure.value, figure.lower, figure.upper))
    return Row(label, change, lower, upper, figure.kind, _short(figure))


def _short(figure: Figure) -> str:
    """`2 x NVIDIA H200 (of 4 in the host), 32 cores of ...` as `2 x H200`; what was simulated needs no machine."""
    if figure.kind == "simulated":
        return "time model"
    return figure.hardware.split(",")[0].split(" (")[0].replace("NVIDIA ", "").replace(" 80GB HBM3", "")


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")
