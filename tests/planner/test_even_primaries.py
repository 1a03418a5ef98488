"""Plans for ``primary``: every map allows an even choice of one active slot an expert."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_eplb_affinity.dispatch.primaries import over_share, primaries_of
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan
from sglang_eplb_affinity.planner.even_primaries import primaries_first, with_even_primaries


def over(row: np.ndarray, experts: int, topology: Topology) -> int:
    table = ExpertMap(row[None], experts).logical_to_all_physical()
    return over_share(primaries_of(table, topology, len(row))[0], topology, len(row))


def window(experts: int, k: int, seed: int, tokens: int = 400) -> RoutingWindow:
    rng = np.random.default_rng(seed)
    hot = rng.normal(scale=1.2, size=experts)
    topics = 2.0 * (rng.integers(0, 4, (tokens, 1)) == rng.integers(0, 4, experts))
    scores = rng.gumbel(size=(tokens, experts)) + hot + topics
    chosen = np.argsort(-scores, axis=1)[:, :k].astype(np.int16)[None]
    return RoutingWindow(np.bincount(chosen.ravel(), minlength=experts)[None], None, chosen)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_map_is_mended_by_as_many_slots_as_experts_are_over(data: st.DataObject) -> None:
    gpus = data.draw(st.sampled_from([2, 3, 4, 8, 16, 32, 64]))
    experts = data.draw(st.integers(1, 160))
    per_gpu = -(-experts // gpus) + data.draw(st.integers(0, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    slots = per_gpu * gpus
    hot = rng.integers(0, experts, max(1, experts // data.draw(st.sampled_from([1, 8]))))  # few or all have replicas
    row = np.r_[np.arange(experts), rng.choice(hot, slots - experts)].astype(np.int32)
    row = row if data.draw(st.booleans()) else rng.permutation(row).astype(np.int32)
    topology = Topology(gpus)
    recorded = window(experts, min(8, experts), 0, 50)
    before = over(row, experts, topology)
    mended = with_even_primaries(
        row, recorded.counts[0], recorded.tokens[0], topology, lambda new: (float((new != row).sum()),)
    )
    assert over(mended, experts, topology) == 0
    assert (mended != row).sum() <= 2 * before  # a swap changes two slots
    assert set(mended.tolist()) == set(range(experts))


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_every_plan_is_even(data: st.DataObject) -> None:
    nodes = data.draw(st.sampled_from([1, 2]))
    gpus = nodes * data.draw(st.sampled_from([1, 2, 4]))
    experts = gpus * data.draw(st.integers(1, 6))
    slots = experts + gpus * data.draw(st.integers(0, min(3, experts - experts // gpus)))  # at most all on every GPU
    topology, recorded = Topology(gpus, nodes), window(experts, min(4, experts), data.draw(st.integers(0, 1000)))
    objective = data.draw(st.sampled_from(["normal", "low_latency", "mixed"]))
    survive = data.draw(st.sampled_from(["none", "rank"]))
    config = PlannerConfig(objective=objective, dispatch="primary", threads=1, survive=survive)
    planned = plan(recorded, topology, slots, config)
    assert over(planned.expert_map.physical_to_logical[0], experts, topology) == 0
    uneven = eplb_placement(recorded.counts, topology, slots)  # in force: kept only if it is even
    again = plan(recorded, topology, slots, replace(config, minimum_gain=0.9), current=uneven)
    assert over(again.expert_map.physical_to_logical[0], experts, topology) == 0


def test_eplbs_map_that_is_uneven_is_mended_within_its_load() -> None:
    topology, config, added = Topology(8), PlannerConfig(dispatch="primary", threads=1), []
    for drawn in (3, 4, 5, 6):
        recorded = window(64, 8, drawn, 2000)
        eplb = eplb_placement(recorded.counts, topology, 72)
        assert over(eplb.physical_to_logical[0], 64, topology) > 0
        planned = plan(recorded, topology, 72, config)
        assert over(planned.expert_map.physical_to_logical[0], 64, topology) == 0
        free = plan(recorded, topology, 72, replace(config, even_primaries=False)).report
        assert planned.report.planned.cost[0] <= free.planned.cost[0] * 1.03
        added.append(planned.report.planned.load_max_over_mean[0] - free.eplb.load_max_over_mean[0])
    # Of one: 1 %, a standard error of the window's load, and 0.02 for what shares of a sample do not know.
    assert max(added) <= 0.05 and np.mean(added) <= 0.02


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.integers(1, 4), st.integers(0, 3))
def test_primaries_come_first_with_the_load_even(seed: int, gpus: int, share: int, more: int) -> None:
    rng, experts, topology = np.random.default_rng(seed), gpus * share, Topology(gpus)
    more = min(more, experts - share)
    lacks = [np.setdiff1d(np.arange(experts), np.arange(g * share, (g + 1) * share)) for g in range(gpus)]
    own = [np.r_[np.arange(g * share, (g + 1) * share), rng.choice(lacks[g], more, replace=False)] for g in range(gpus)]
    row = np.concatenate([rng.permutation(part) for part in own]).astype(np.int32)
    counts = rng.integers(0, 1000, experts)

    def primaries(row: np.ndarray) -> np.ndarray:
        return primaries_of(ExpertMap(row[None], experts).logical_to_all_physical(), topology, len(row))[0]

    def squares(row: np.ndarray) -> float:
        load = np.bincount(primaries(row) // (share + more), weights=counts, minlength=gpus)
        return float((load**2).sum())

    ordered = primaries_first(row, counts, topology)
    assert (primaries(ordered) % (share + more) < share).all() and over(ordered, experts, topology) == 0
    assert (ordered[primaries(ordered)] == np.arange(experts)).all()
    before, after = (np.sort(part.reshape(gpus, -1), axis=1) for part in (row, ordered))
    assert (before == after).all()  # no expert changes its GPU
    assert squares(ordered) <= squares(row)
    assert (primaries_first(ordered, counts, topology, ordered) == ordered).all()  # which moves nothing the next time


def test_the_load_of_primaries_is_the_least() -> None:
    row = np.array([0, 1, 2, 3, 2, 3, 0, 1], np.int32)  # two GPUs that hold all four experts
    ordered = primaries_first(row, np.array([10, 9, 2, 1]), Topology(2))
    primary = primaries_of(ExpertMap(ordered[None], 4).logical_to_all_physical(), Topology(2), 8)[0]
    assert np.bincount(primary // 4, weights=[10, 9, 2, 1]).tolist() == [11, 11]
