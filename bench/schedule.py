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
class Session:
    """One server start: one arm of one block, with its concurrencies in the order in which they are measured."""

    block: int
    arm: str
    concurrency: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"b{self.block}-{self.arm}"

    @property
    def cells(self) -> tuple[CellKey, ...]:
        return tuple(CellKey(self.block, self.arm, c) for c in self.concurrency)


def williams_rows(n: int) -> list[list[int]]:
    """Orders of 0..n-1 in which each item follows each other item equally often (Williams, 1949).

    n rows for an even n, 2n for an odd n. Each item is also equally often at each place.
    """
    first = [0]
    for step in range(1, n):
        first.append((step + 1) // 2 if step % 2 else n - step // 2)
    rows = [[(value + shift) % n for value in first] for shift in range(n)]
    return rows if n % 2 == 0 else rows + [row[::-1] for row in rows]


def plan_sessions(arms: Sequence[str], concurrency: Sequence[int], blocks: int) -> list[Session]:
    """All arms in every block, in Williams order; the order of concurrency is reversed on alternate blocks."""
    rows = williams_rows(len(arms))
    rising = tuple(sorted(concurrency))
    return [
        Session(block, arms[i], rising if block % 2 == 0 else rising[::-1])
        for block in range(blocks)
        for i in rows[block % len(rows)]
    ]


def block_seed(seed: int, block: int) -> int:
    """Another sample of requests for every block, the same for all arms of a block."""
    return seed * 1000 + block
