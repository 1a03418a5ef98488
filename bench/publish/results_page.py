"""docs/results.md: every entry of results/summary.json by the question it answers, its provenance in footnotes."""

from __future__ import annotations

from collections.abc import Sequence

from bench.publish.catalogue import OTHER, by_table, catalogue
from bench.publish.figure_tables import figure_tables
from bench.publish.summary import Figure

HEAD = """# Results

Every headline figure, made from [results/summary.json](../results/summary.json) by `python -m bench docs`. In brackets
a figure's interval: 95 % over blocks for times of servers, the range over rows, seeds or sizes for others. *Emulated*:
real software, part of the hardware imitated, such as a slower link. *Simulated*: computed from recorded routing or by
the time model. What has neither word was measured on the hardware of its footnote. Vanilla EPLB is SGLang's own. What a
run's figures rest on, row by row, is in `results/RUN/table.md`.
"""


def results_page(figures: Sequence[Figure]) -> str:
    """The whole page. An entry that no table of the catalogue takes stands at the end, under "Further figures"."""
    tables, sources = by_table(figures), _Sources()
    parts = [HEAD]
    for question in catalogue().questions:
        found = [table for table in question.tables if table in tables]
        if found:
            parts.append(f"## {question.title}\n")
        for table in found:
            about = f"{table.about}\n\n" if table.about else ""
            rows = figure_tables(tables[table], table.drop, sources.marks)
            parts.append(f"### {table.title}\n\n{about}" + "\n\n".join(rows) + "\n")
    if None in tables:
        parts += [f"## {OTHER}\n", "\n\n".join(figure_tables(tables[None], (), sources.marks)) + "\n"]
    parts.append("\n".join(sources.lines()) + "\n")
    return "\n".join(parts)


class _Sources:
    """Footnotes: one for each command, hardware, date and commit."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def marks(self, figures: Sequence[Figure]) -> str:
        texts = dict.fromkeys(f"`{f.command}` on {f.hardware}, {f.date[:10]}, commit {f.commit[:8]}." for f in figures)
        return "".join(f"[^{self._numbers.setdefault(text, len(self._numbers) + 1)}]" for text in texts)

    def lines(self) -> list[str]:
        return [f"[^{number}]: {text}" for text, number in self._numbers.items()]
