"""What the entries of results/summary.json are called, and which question each answers (catalogue.toml)."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.publish.summary import Figure

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("catalogue.toml")
OTHER = "Further figures"
_SHAPE = re.compile(r"(\d+)x(\d+)(?:-(cover)(\d+))?")
_VERSION = re.compile(r"\d+(_\d+)+")


@dataclass(frozen=True)
class Table:
    """One table of the page. ``prefixes``: of its entries' names; ``drop``: parts that its title says."""

    title: str
    prefixes: tuple[str, ...]
    drop: tuple[str, ...]
    about: str = ""

    def match(self, name: str) -> int:
        """Length of the longest prefix that ``name`` begins with; 0 where there is none."""
        return max((len(p) for p in self.prefixes if f"{name}.".startswith(f"{p}.")), default=0)


@dataclass(frozen=True)
class Question:
    title: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Headline:
    """A row of the README's table: the first of ``entries`` that was measured."""

    entries: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Catalogue:
    questions: tuple[Question, ...]
    headlines: tuple[Headline, ...]
    words: dict[str, str]

    def table_of(self, name: str) -> Table | None:
        tables = [table for question in self.questions for table in question.tables]
        best = max(tables, key=lambda table: table.match(name))
        return best if best.match(name) else None

    def label(self, parts: Sequence[str]) -> str:
        """Parts of a name as a reader would say them: `["nvlink", "none"]` is "NVLink, no EPLB"."""
        return ", ".join(map(self._word, parts))

    def _word(self, part: str) -> str:
        if part in self.words:
            return self.words[part]
        if shape := _SHAPE.fullmatch(part):
            gpus, nodes, cover, redundant = shape.groups()
            return f"{gpus} GPUs on {nodes} node{'s' * (nodes != '1')}" + (
                f", `cover`, {redundant} redundant" * bool(cover)
            )
        if _VERSION.fullmatch(part):
            return part.replace("_", ".")
        return part.replace("_", " ")


@cache
def catalogue() -> Catalogue:
    data: dict[str, Any] = tomllib.loads(FILE.read_text(encoding="utf-8"))
    questions = tuple(Question(q["title"], tuple(map(_table, q["table"]))) for q in data["question"])
    headlines = tuple(Headline(tuple(h["entries"]), h["label"]) for h in data["headline"])
    return Catalogue(questions, headlines, data["words"])


def _table(data: dict[str, Any]) -> Table:
    prefixes = tuple(data["prefixes"])
    drop = data.get("drop", prefixes[0].split("."))
    return Table(data["title"], prefixes, tuple(drop), data.get("about", "").strip())


def natural(name: str) -> list[tuple[str, int]]:
    """Sort key: numbers in a name by value."""
    return [(text, int(part or 0)) for text, part in re.findall(r"([^\d]*)(\d*)", name)]


def by_table(figures: Sequence[Figure]) -> dict[Table | None, list[Figure]]:
    """Figures of each table, sorted by name; those of none under None."""
    found: dict[Table | None, list[Figure]] = {}
    for figure in sorted(figures, key=lambda figure: natural(figure.name)):
        found.setdefault(catalogue().table_of(figure.name), []).append(figure)
    return found
