from collections import Counter
from itertools import pairwise

import pytest

from bench.schedule import block_seed, plan_sessions, williams_rows


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_order_is_balanced(n: int) -> None:
    rows = williams_rows(n)
    assert all(sorted(row) == list(range(n)) for row in rows)
    for place in range(n):
        assert len(set(Counter(row[place] for row in rows).values())) == 1
    followers = Counter((a, b) for row in rows for a, b in pairwise(row))
    assert len(followers) == n * (n - 1) and len(set(followers.values())) <= 1


def test_every_block_measures_everything_once_and_reverses_concurrency() -> None:
    sessions = plan_sessions(["none", "vanilla", "affinity"], [8, 1], blocks=2)
    cells = [cell for session in sessions for cell in session.cells]
    assert len(cells) == len(set(cells)) == 12
    assert {s.concurrency for s in sessions if s.block == 0} == {(1, 8)}
    assert {s.concurrency for s in sessions if s.block == 1} == {(8, 1)}


def test_more_blocks_only_add() -> None:
    few, many = (plan_sessions(["none", "vanilla", "affinity"], [1], blocks) for blocks in (2, 5))
    assert many[: len(few)] == few


def test_blocks_have_seeds_of_their_own() -> None:
    assert len({block_seed(seed, block) for seed in (1, 2) for block in range(100)}) == 200
