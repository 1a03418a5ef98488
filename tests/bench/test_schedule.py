from collections import Counter
from itertools import pairwise

import pytest

from bench.harness.schedule import Level, block_seed, plan_sittings, williams_rows


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_order_is_balanced(n: int) -> None:
    rows = williams_rows(n)
    assert all(sorted(row) == list(range(n)) for row in rows)
    for place in range(n):
        assert len(set(Counter(row[place] for row in rows).values())) == 1
    followers = Counter((a, b) for row in rows for a, b in pairwise(row))
    assert len(followers) == n * (n - 1) and len(set(followers.values())) <= 1


def test_every_block_measures_everything_once_and_reverses_concurrency() -> None:
    sittings = plan_sittings(["none", "vanilla", "affinity"], [Level(1), Level(8)], blocks=2)
    cells = [cell for sitting in sittings for cell in sitting.cells]
    assert len(cells) == len(set(cells)) == 12
    levels = [(s.cells[0].block, tuple(cell.concurrency for cell in s.cells)) for s in sittings]
    assert set(levels) == {(0, (1, 8)), (1, (8, 1))}
    assert all(len(sitting.arms) == 1 for sitting in sittings)


@pytest.mark.parametrize("arms", [("vanilla", "affinity"), ("none", "vanilla", "affinity")])
def test_arms_side_by_side_take_turns_at_each_concurrency(arms: tuple[str, ...]) -> None:
    (sitting,) = plan_sittings(arms, [Level(1), Level(8), Level(64)], blocks=6, side_by_side=True)
    assert len(sitting.cells) == len(set(sitting.cells)) == 18 * len(arms) and set(sitting.arms) == set(arms)
    turns = [sitting.cells[i : i + len(arms)] for i in range(0, len(sitting.cells), len(arms))]
    assert all({cell.arm for cell in turn} == set(arms) for turn in turns)
    assert all(len({(cell.block, cell.concurrency) for cell in turn}) == 1 for turn in turns)
    for level in (1, 8, 64):
        places = Counter((i, c.arm) for turn in turns if turn[0].concurrency == level for i, c in enumerate(turn))
        assert set(places.values()) == {6 // len(arms)}
    assert [turn[0].concurrency for turn in turns[:6]] == [1, 8, 64, 64, 8, 1]


def test_more_blocks_only_add() -> None:
    arms = ["none", "vanilla", "affinity"]
    few, many = (plan_sittings(arms, [Level(1)], blocks) for blocks in (2, 5))
    assert many[: len(few)] == few
    ((one,), (more,)) = (plan_sittings(arms, [Level(1), Level(4)], blocks, side_by_side=True) for blocks in (2, 5))
    assert more.cells[: len(one.cells)] == one.cells


def test_blocks_have_seeds_of_their_own() -> None:
    assert len({block_seed(seed, block) for seed in (1, 2) for block in range(100)}) == 200
