"""In which order the cells are measured, so that drift of the machine does not favour an arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class CellKey:
    """One measurement: a block, an arm, a concurrency, a load (the main one has no name). Its name is a folder and a
    key of the store."""

    block: int
    arm: str
    concurrency: int
    load: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (f"b{self.block}", self.arm, self.load, f"c{self.concurrency}")))


@dataclass(frozen=True)
class Level:
    """A load at one concurrency, measured in the first ``blocks`` blocks (0: in all)."""

    concurrency: int
    load: str = ""
    blocks: int = 0


@dataclass(frozen=True)
class Sitting:
    """What is measured between one start of servers and their end: cells, in the order in which they are measured."""

    name: str
    cells: tuple[CellKey, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """Whose servers run, in order of first use."""
        return tuple(dict.fromkeys(cell.arm for cell in self.cells))


def williams_rows(n: int) -> list[list[int]]:
    """Orders of 0..n-1 in which each item follows each other item equally often (Williams, 1949).

    n rows for an even n, 2n for an odd n. Each item is also equally often at each place.
    """
    first = [0]
    for step in range(1, n):
        first.append((step + 1) // 2 if step % 2 else n - step // 2)
    rows = [[(value + shift) % n for value in first] for shift in range(n)]
    return rows if n % 2 == 0 else rows + [row[::-1] for row in rows]


def plan_sittings(
    arms: Sequence[str], levels: Sequence[Level], blocks: int, side_by_side: bool = False
) -> list[Sitting]:
    """Every arm at every level in every block; the order of levels is reversed on alternate blocks.

    One server at a time: a sitting is an arm of a block, and the arms of a block follow each other in Williams order.
    Side by side: there is one sitting, and the arms take turns at each level, each time in the next Williams
    order.
    """
    rows = williams_rows(len(arms))
    sittings, turns = [], []
    for block in range(blocks):
        wanted = [(place, level) for place, level in enumerate(levels) if not level.blocks or block < level.blocks]
        for_block = wanted if block % 2 == 0 else wanted[::-1]
        if side_by_side:
            for place, level in for_block:
                row = rows[(block + place) % len(rows)]
                turns += [CellKey(block, arms[i], level.concurrency, level.load) for i in row]
        else:
            for i in rows[block % len(rows)]:
                cells = tuple(CellKey(block, arms[i], level.concurrency, level.load) for _, level in for_block)
                sittings.append(Sitting(f"b{block}-{arms[i]}", cells))
    return [Sitting("side-by-side", tuple(turns))] if side_by_side else sittings


def block_seed(seed: int, block: int) -> int:
    """Another sample of requests for every block, the same for all arms of a block."""
    return seed * 1000 + block
