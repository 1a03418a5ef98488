"""The searches' incremental bookkeeping against plain counting."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.bitmaps import expert_bitmaps, token_lists
from sglang_eplb_affinity.planner.random_steps import NEG_LOG, next_random, schedule
from sglang_eplb_affinity.planner.search_arguments import Balance, Costs, Grid, Items, Moves, Steps
from sglang_eplb_affinity.planner.swap_search import search_swaps
from tests.planner.windows import skewed_tokens


def fanouts(tokens: np.ndarray, row: np.ndarray, topology: Topology, rule: str = "dynamic") -> tuple[int, int]:
    traffic = measure(tokens[None], ExpertMap(row[None], int(row.max()) + 1), topology, rule, None)  # type: ignore[arg-type]
    return round(traffic.gpu_fanout[0] * len(tokens)), round(traffic.node_fanout[0] * len(tokens))


@pytest.mark.parametrize("nodes", [1, 2])
def test_swap_search_only_takes_swaps_that_help(nodes):  # type: ignore[no-untyped-def]
    """Greedy (temperature 0) from many starts: exact deltas never let the true cost rise, and a wrong table would."""
    topology = Topology(4, nodes)
    for seed in range(8):
        tokens = skewed_tokens(np.random.default_rng(seed), 1, 130, 16, 4)[0]
        counts = np.bincount(tokens.ravel(), minlength=16).astype(np.int64)
        start, members = token_lists(tokens, 16)
        row = np.random.default_rng(seed + 100).permutation(16).astype(np.int32)
        last = fanouts(tokens, row, topology)
        for stage in range(30):
            before = row.copy()
            search_swaps(
                row,
                Items(tokens, expert_bitmaps(tokens, 16), start, members, np.arange(16, dtype=np.int32), counts),
                Grid(4, 4 // nodes, nodes),
                Costs(8, 16, 0, 0),
                Balance(1 << 40, 0, 0, np.zeros((16, 1), np.int32), 0),
                Moves(np.ones((16, 4), np.uint8), 1 << 30, 0),
                Steps(np.zeros(1, np.int64), NEG_LOG, 40, stage * 7 + seed),
            )
            now = fanouts(tokens, row, topology)
            assert 8 * now[0] + 16 * (now[1] if nodes > 1 else 0) <= 8 * last[0] + 16 * (last[1] if nodes > 1 else 0)
            assert sorted(before.tolist()) == sorted(row.tolist())
            last = now


def test_random_numbers_and_schedule_are_integers_and_repeat():
    state = np.array([7], np.uint64)
    first = [next_random(state) for _ in range(1000)]
    state = np.array([7], np.uint64)
    assert first == [next_random(state) for _ in range(1000)]
    assert min(first) >= 0 and max(first) < 2**31 and len(set(first)) == 1000
    steps = schedule(10, 5000, 10)
    assert steps[0] == 5000 and steps[-1] == 0 and (np.diff(steps) < 0).all()
