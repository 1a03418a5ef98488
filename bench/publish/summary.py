"""results/summary.json: every headline figure of the project, one entry each, with where it comes from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically

KINDS = ("measured", "emulated", "simulated")
_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_-]+)+")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}:\d{2}Z)?")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


@dataclass(frozen=True)
class Figure:
    """One figure. ``lower`` and ``upper`` are its interval (equal to ``value`` where there is none to give).

    ``kind``: `measured` on the hardware named, `emulated` (real software, part of the hardware imitated, such as a
    slower link) or `simulated` (computed from a model).
    """

    name: str
    value: float
    lower: float
    upper: float
    unit: str
    kind: str
    hardware: str
    versions: dict[str, str]
    commit: str
    date: str
    command: str

    def __post_init__(self) -> None:
        def fail(field: str, wanted: str) -> None:
            raise InputError(f"summary entry {self.name!r}: {field} is {getattr(self, field)!r}, but must be {wanted}")

        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            fail("name", "lower case words joined by dots, such as planner.olmoe.gpu_fanout")
        for field in ("value", "lower", "upper"):
            number = getattr(self, field)
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                fail(field, "a finite number")
        if not self.lower <= self.value <= self.upper:
            fail("value", f"between lower {self.lower!r} and upper {self.upper!r}")
        if self.kind not in KINDS:
            fail("kind", f"one of {', '.join(KINDS)}")
        for field in ("unit", "hardware", "command"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field).strip():
                fail(field, "a text that is not empty")
        if not isinstance(self.versions, dict) or not self.versions:
            fail("versions", "a table of package versions that is not empty")
        if not isinstance(self.commit, str) or not _COMMIT.fullmatch(self.commit):
            fail("commit", "a git commit in hexadecimal")
        if not isinstance(self.date, str) or not _DATE.fullmatch(self.date):
            fail("date", "YYYY-MM-DD or YYYY-MM-DDTHH:MM:SSZ")


_FIELDS = tuple(f.name for f in fields(Figure))


def parse_figures(data: Any, source: str) -> list[Figure]:
    """Figures of a list of entries, or of ``{"entries": [...]}``; raises InputError naming the source and entry."""
    entries = data.get("entries") if isinstance(data, dict) else data
    if not isinstance(entries, list):
        raise InputError(f'{source}: expected a list of entries or {{"entries": [...]}}')
    found: dict[str, Figure] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != set(_FIELDS):
            wrong = sorted(set(entry) ^ set(_FIELDS)) if isinstance(entry, dict) else ["not a table"]
            raise InputError(f"{source}: entry {number} must have exactly {', '.join(_FIELDS)} (check {wrong[0]!r})")
        try:
            figure = Figure(**entry)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        if figure.name in found:
            raise InputError(f"{source}: two entries named {figure.name!r}; names must be unique")
        found[figure.name] = figure
    return list(found.values())


def of_ranks(ranks: int) -> str:
    """What a figure of GPUs is prefixed with: nothing on 2 ranks, `ep4.` on 4 and so on."""
    return "" if ranks == 2 else f"ep{ranks}."


def load_figures(path: Path) -> list[Figure]:
    try:
        return parse_figures(json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON") from None


def merge_figures(old: Iterable[Figure], new: Iterable[Figure]) -> list[Figure]:
    """By name; of two with one name that with the later date is kept (the later given one if dates are equal)."""
    merged = {figure.name: figure for figure in old}
    for figure in new:
        known = merged.get(figure.name)
        if known is None or figure.date >= known.date:
            merged[figure.name] = figure
    return sorted(merged.values(), key=lambda figure: figure.name)


def dump_figures(figures: Iterable[Figure], path: Path) -> None:
    """Write entries sorted by name; atomically. Raises InputError where ``path`` has entries that this would lose."""
    entries = [asdict(figure) for figure in sorted(figures, key=lambda figure: figure.name)]
    if path.is_file():
        lost = {figure.name for figure in load_figures(path)} - {entry["name"] for entry in entries}
        if lost:
            raise InputError(
                f"{path}: has {len(lost)} other entries, such as {min(lost)}, which this would lose; write elsewhere "
                "and merge with `python -m bench summary add`"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps({"entries": entries}, indent=2) + "\n").encode())
