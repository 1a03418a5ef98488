"""In which order the cells are measured, so that drift of the machine does not favour an arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class CellKey:
    """One measurement: a block, an arm, a concurrency. Its name is a folder and a key of the store."""

    block: int
    arm: str
    concurrency: int

    @property
    def name(self) -> str:
        return f"b{self.block}-{self.arm}-c{self.concurrency}"


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
    arms: Sequence[str], concurrency: Sequence[int], blocks: int, side_by_side: bool = False
) -> list[Sitting]:
    """Every arm at every concurrency in every block; the order of concurrency is reversed on alternate blocks.

    One server at a time: a sitting is an arm of a block, and the arms of a block follow each other in Williams order.
    Side by side: there is one sitting, and the arms take turns at each concurrency, each time in the next Williams
    order.
    """
    rows = williams_rows(len(arms))
    rising = tuple(sorted(concurrency))
    sittings, turns = [], []
    for block in range(blocks):
        levels = rising if block % 2 == 0 else rising[::-1]
        if side_by_side:
            for level in levels:
                row = rows[(block + rising.index(level)) % len(rows)]
                turns += [CellKey(block, arms[i], level) for i in row]
        else:
            for i in rows[block % len(rows)]:
                cells = tuple(CellKey(block, arms[i], level) for level in levels)
                sittings.append(Sitting(f"b{block}-{arms[i]}", cells))
    return [Sitting("side-by-side", tuple(turns))] if side_by_side else sittings


def block_seed(seed: int, block: int) -> int:
    """Another sample of requests for every block, the same for all arms of a block."""
    return seed * 1000 + block
