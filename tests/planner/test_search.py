"""The searches' incremental bookkeeping and bit-parallel evaluation against plain counting."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.bitmaps import expert_bitmaps, token_lists
from sglang_eplb_affinity.planner.cover_evaluation import evaluate_cover, pin_gpu
from sglang_eplb_affinity.planner.layer_search import _coin_bitmaps
from sglang_eplb_affinity.planner.random_steps import NEG_LOG, next_random, schedule
from sglang_eplb_affinity.planner.search_arguments import Balance, Costs, Grid, Items, Moves, Steps
from sglang_eplb_affinity.planner.swap_search import search_swaps
from tests.planner.test_plan import skewed_tokens


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


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("replicated", [0, 6])
def test_cover_evaluation_agrees_with_the_rule(nodes, replicated):  # type: ignore[no-untyped-def]
    """Exact without replicas; with them the order of ties differs, so fan-outs agree closely, loads add up exactly."""
    topology = Topology(4, nodes)
    experts, slots = 24 - replicated, 24
    rng = np.random.default_rng(3)
    tokens = skewed_tokens(rng, 1, 2000, experts, 4)[0]
    row = rng.permutation(np.concatenate([np.arange(experts), rng.permutation(experts)[:replicated]])).astype(np.int32)
    for gpu in range(4):
        row[gpu * 6 : gpu * 6 + 6] = np.sort(row[gpu * 6 : gpu * 6 + 6])
    counts = np.bincount(tokens.ravel(), minlength=experts).astype(np.int64)
    bits = expert_bitmaps(tokens, experts)
    words = bits.shape[1]
    replicas = np.bincount(row, minlength=experts)
    where = np.zeros((experts, 4), np.int64)
    filled = np.zeros(experts, int)
    for slot, expert in enumerate(row):
        where[expert, filled[expert]] = slot // 6
        filled[expert] += 1
    pinned, pinned_load, load = np.zeros((4, words), np.uint64), np.zeros(4, np.int64), np.zeros(4, np.int64)
    for gpu in range(4):
        pin_gpu(row, replicas, bits, counts, 6, gpu, pinned, pinned_load)
    cost, excess = evaluate_cover(
        replicas, where, bits, _coin_bitmaps(experts, words), counts, counts, 4 // nodes, nodes, 1, 0, 0, pinned,
        pinned_load, 1 << 40, 1 << 40, 0, 1, np.empty((4, words), np.uint64), np.empty((nodes, words), np.uint64), load,
        np.empty(words, np.uint64),
    )  # fmt: skip
    expected, _ = fanouts(tokens, row, topology, "cover")
    assert excess == 0
    assert abs(int(load.sum()) - int(counts.sum())) <= slots
    if replicated:
        assert cost == pytest.approx(expected, rel=0.01)
    else:
        assert cost == expected


def test_random_numbers_and_schedule_are_integers_and_repeat():
    state = np.array([7], np.uint64)
    first = [next_random(state) for _ in range(1000)]
    state = np.array([7], np.uint64)
    assert first == [next_random(state) for _ in range(1000)]
    assert min(first) >= 0 and max(first) < 2**31 and len(set(first)) == 1000
    steps = schedule(10, 5000, 10)
    assert steps[0] == 5000 and steps[-1] == 0 and (np.diff(steps) < 0).all()
