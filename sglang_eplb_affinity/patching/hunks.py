"""Hunks of a patch one by one: whether each would apply to a text, and where."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

_FILE = re.compile(r"^--- (?:a/)?(\S+)\n\+\+\+ (?:b/)?(\S+)\n", re.M)
_HUNK = re.compile(r"^@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@(.*)$", re.M)


@dataclass(frozen=True)
class Hunk:
    """``old`` and ``new`` are its lines before and after, context included; ``line`` where ``old`` begins (from 1)."""

    file: str
    line: int
    old: tuple[str, ...]
    new: tuple[str, ...]
    adds_file: bool = False

    @property
    def changed_lines(self) -> int:
        """Lines that it removes or adds."""
        matcher = SequenceMatcher(None, self.old, self.new, autojunk=False)
        same = sum(block.size for block in matcher.get_matching_blocks())
        return len(self.old) + len(self.new) - 2 * same


@dataclass(frozen=True)
class Outcome:
    """``result``: `applies`, `moved` (at another line), `already there` or `fails`."""

    result: str
    where: str


def hunks_of(diff: str) -> Iterator[Hunk]:
    files = list(_FILE.finditer(diff))
    for index, file in enumerate(files):
        old_name, new_name = file.groups()
        body = diff[file.end() : files[index + 1].start() if index + 1 < len(files) else len(diff)]
        marks = list(_HUNK.finditer(body))
        for number, mark in enumerate(marks):
            end = marks[number + 1].start() if number + 1 < len(marks) else len(body)
            lines = body[mark.end() + 1 : end].splitlines()
            yield Hunk(
                file=new_name if old_name == "/dev/null" else old_name,
                line=int(mark.group(1)),
                old=tuple(line[1:] for line in lines if line[:1] in (" ", "-", "")),
                new=tuple(line[1:] for line in lines if line[:1] in (" ", "+", "")),
                adds_file=old_name == "/dev/null",
            )


def try_hunk(hunk: Hunk, text: list[str] | None, shift: int) -> tuple[list[str] | None, Outcome, int]:
    """Apply ``hunk`` to the lines of its file (None: no such file), ``shift`` lines off what it says.

    Returns the lines after it (unchanged if it fails), what came of it, and the shift for the next hunk of the file.
    """
    if hunk.adds_file:
        if text is None:
            return list(hunk.new), Outcome("applies", "new file"), 0
        return text, Outcome("fails", "the file is there already"), 0
    if text is None:
        return None, Outcome("fails", "no such file"), 0
    wanted = hunk.line - 1 + shift
    places = _places(text, hunk.old)
    if places:
        at = min(places, key=lambda place: abs(place - wanted))
        after = [*text[:at], *hunk.new, *text[at + len(hunk.old) :]]
        moved = at - (hunk.line - 1)
        result = Outcome("applies" if at == wanted else "moved", f"line {at + 1}" + _others(places))
        return after, result, moved + len(hunk.new) - len(hunk.old)
    there = _places(text, hunk.new)
    if there:
        return text, Outcome("already there", f"line {there[0] + 1}"), shift
    return text, Outcome("fails", _nearest(text, hunk.old, wanted)), shift


def _places(text: list[str], block: tuple[str, ...]) -> list[int]:
    size = len(block)
    if not size:
        return []
    wanted = list(block)
    return [at for at in range(len(text) - size + 1) if text[at] == wanted[0] and text[at : at + size] == wanted]


def _others(places: list[int]) -> str:
    return f" (fits at {len(places)} places)" if len(places) > 1 else ""


def _nearest(text: list[str], block: tuple[str, ...], wanted: int) -> str:
    """Where most of the block's lines are, and the first line of it that is not there."""
    matcher = SequenceMatcher(None, text, block, autojunk=False)
    # The run with the most text: one of blank lines or brackets is found anywhere.
    best = max(
        matcher.get_matching_blocks(),
        key=lambda run: sum(len(line.strip()) for line in block[run.b : run.b + run.size]),
    )
    if not best.size:
        return f"near line {max(wanted, 0) + 1}: none of its lines is there"
    start = max(best.a - best.b, 0)
    have = set(text[start : start + 2 * len(block) + 10])
    missing = next((line.strip() for line in block if line not in have), "")
    return f"near line {start + 1}: " + (f"no `{missing}`" if missing else "its lines are in another order")
