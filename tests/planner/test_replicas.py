"""Many replicas: every layer is searched, no GPU holds an expert twice, and more slots never cost more."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.dispatch.losses import without_gpus
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan
from sglang_eplb_affinity.planner.layout import without_duplicates
from sglang_eplb_affinity.planner.numbering import numbering
from sglang_eplb_affinity.planner.plan_layer import IN_USE_BETTER
from sglang_eplb_affinity.planner.redundancy import knee, redundancies_within, slots_within, try_redundancies
from sglang_eplb_affinity.planner.survival import Survive, uncovered
from sglang_eplb_affinity.planner.token_service import LOAD_UNIT, sample_of, serve_all
from tests.planner.windows import skewed_tokens, window_of


def hot_tokens(seed: int, layers: int = 1, count: int = 1200, experts: int = 16) -> np.ndarray:
    """Token sets of 4 in which expert 0 is in nearly all: EPLB gives it more replicas than there are GPUs."""
    tokens = skewed_tokens(np.random.default_rng(seed), layers, count, experts, 4)
    return np.where((tokens == 0).any(-1, keepdims=True) | (np.arange(4) > 0), tokens, 0).astype(np.int16)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("rule", ["cover", "static", "dynamic"])
def test_every_redundancy_is_searched_and_costs_no_more_than_fewer(nodes, rule):  # type: ignore[no-untyped-def]
    window, topology = window_of(hot_tokens(1), 16), Topology(4, nodes)
    costs = []
    for slots in range(16, 65, 8):
        result = plan(window, topology, slots, PlannerConfig(dispatch=rule))
        # EPLB's own placement, where spreading blindly over its duplicates costs less than parting them.
        if rule == "cover" or result.report.fallback == ("",):
            for gpu in result.expert_map.physical_to_logical.reshape(4, -1):
                assert len(set(gpu.tolist())) == len(gpu)
        if rule == "cover":
            assert result.report.fallback == ("",) or slots == 64
        costs.append(float(result.report.planned.cost[0]))
    if rule == "cover":
        assert (np.diff(costs) <= 0.02).all(), costs
        assert costs[-1] == pytest.approx(1.0 + (2.0 if nodes > 1 else 0.0))


def test_every_expert_on_every_gpu():
    window = window_of(skewed_tokens(np.random.default_rng(2), 2, 1600, 8, 3), 8)
    planned = plan(window, Topology(8), 64).report.planned
    assert planned.gpu_fanout == pytest.approx(1.0) and planned.load_max_over_mean == pytest.approx(1.0, abs=1e-9)


def test_duplicates_give_way_to_experts_that_the_gpu_lacks():
    counts = np.array([1000, 1, 2, 3], np.int64)
    row = eplb_placement(counts[None], Topology(2), 6).physical_to_logical[0]
    assert any(len(set(gpu)) < 3 for gpu in row.reshape(2, 3).tolist())
    parted = without_duplicates(row, counts, Topology(2))
    assert all(len(set(gpu)) == 3 for gpu in parted.reshape(2, 3).tolist())
    assert set(parted.tolist()) == {0, 1, 2, 3} and (parted == 0).sum() == 2


@pytest.mark.parametrize(("gpus", "nodes"), [(4, 1), (8, 2), (6, 3), (80, 10), (150, 2)])
def test_served_tokens_agree_with_the_rule(gpus, nodes):  # type: ignore[no-untyped-def]
    """Fan-outs and loads of the search's own service against the rule; ties go by order instead of the hash."""
    topology, experts, slots = Topology(gpus, nodes), 24, 24 + 3 * gpus + (-24) % gpus
    tokens = skewed_tokens(np.random.default_rng(3), 1, 4800, experts, 4)[0]
    tokens[::7, 3] = -1
    counts = np.bincount(tokens[tokens >= 0], minlength=experts).astype(np.int64)
    row = without_duplicates(eplb_placement(counts[None], topology, slots).physical_to_logical[0], counts, topology)
    holds = np.zeros((experts, gpus), np.int64)
    holds[row, np.arange(slots) // (slots // gpus)] = 1
    names = numbering(gpus, nodes)
    served = serve_all(sample_of(tokens, counts, names.classes), holds, names, 1, 1000)
    source = (np.arange(len(tokens)) % gpus).astype(np.int32)
    traffic = measure(tokens[None], ExpertMap(row[None], experts), topology, "cover", source)
    assert (served.cost % 1000).mean() == pytest.approx(traffic.gpu_fanout[0], rel=0.01)
    if nodes > 1:
        assert (served.cost // 1000).mean() == pytest.approx(traffic.node_fanout[0], rel=0.01)
    difference = np.abs((served.load >> LOAD_UNIT) - traffic.gpu_load[0]) / traffic.gpu_load[0]
    assert difference.max() < 0.06 if gpus <= 8 else difference.mean() < 0.15  # 60 tokens from each of 80 GPUs


@pytest.mark.parametrize(("gpus", "nodes"), [(4, 1), (6, 2)])
def test_masks_of_two_words_serve_as_masks_of_one(gpus, nodes):  # type: ignore[no-untyped-def]
    tokens = skewed_tokens(np.random.default_rng(4), 1, 1000, 24, 4)[0]
    tokens[::7, 3] = -1
    counts = np.bincount(tokens[tokens >= 0], minlength=24).astype(np.int64)
    holds = (np.random.default_rng(5).random((24, gpus)) < 0.4).astype(np.int64)
    holds[np.arange(24), np.arange(24) % gpus] = 1
    narrow = numbering(gpus, nodes)
    wide = narrow._replace(
        node_masks=np.pad(narrow.node_masks, ((0, 0), (0, 1))), leaders=np.pad(narrow.leaders, (0, 1))
    )
    sample = sample_of(tokens, counts, narrow.classes)
    one, two = (serve_all(sample, holds, names, 8, 16) for names in (narrow, wide))
    assert (two.masks[:, ::2] == one.masks).all() and not two.masks[:, 1::2].any()
    assert one.load.sum() == two.load.sum() and one.cost.sum() == pytest.approx(two.cost.sum(), rel=0.01)
    alone = np.bitwise_count(one.masks) == 1  # the others may be ties, which go by order or by a hash
    assert (one.servers == two.servers[:, ::2])[alone].all()


def test_more_than_64_gpus_are_searched_like_fewer():
    """80 GPUs on 10 nodes: better than EPLB's map on the window, exact replicas, the same on any number of threads."""
    window, topology = window_of(skewed_tokens(np.random.default_rng(6), 2, 1500, 64, 4), 64), Topology(80, 10)
    results = [plan(window, topology, 160, PlannerConfig(threads=threads)) for threads in (1, 2)]
    assert (results[0].expert_map.physical_to_logical == results[1].expert_map.physical_to_logical).all()
    report = results[0].report
    assert report.fallback == ("", "") and (report.planned.cost < 0.9 * report.eplb.cost).all()
    assert all(len(set(gpu)) == 2 for gpu in results[0].expert_map.physical_to_logical.reshape(-1, 2).tolist())


@pytest.mark.parametrize("slots", [20, 32, 48])
@pytest.mark.parametrize("warm", [False, True])
def test_a_plan_is_not_worse_than_the_map_in_force_on_both_traffic_and_load(warm, slots):  # type: ignore[no-untyped-def]
    window, topology = window_of(hot_tokens(5, 3), 16), Topology(4)
    best = plan(window, topology, slots, PlannerConfig(search_scale=2, seed=7)).expert_map
    report = plan(window, topology, slots, PlannerConfig(warm_start=warm), best).report
    assert report.current is not None
    worse = report.planned.cost > report.current.cost + 1e-9
    heavier = report.planned.load_max_over_mean > report.current.load_max_over_mean + 1e-9
    assert not (worse & heavier).any()


@pytest.mark.parametrize("rule", ["cover", "static"])
@pytest.mark.parametrize(("survive", "nodes", "gone"), [("rank", 1, [2]), ("node", 2, [2, 3])])
def test_no_expert_is_lost_where_two_replicas_of_all_fit(rule, survive: Survive, nodes, gone):  # type: ignore[no-untyped-def]
    tokens, topology = hot_tokens(6, 2), Topology(4, nodes)
    window = window_of(tokens, 16)
    result = plan(window, topology, 36, PlannerConfig(dispatch=rule, survive=survive))
    assert result.report.uncovered is not None and not result.report.uncovered.any()
    assert "every expert survives" in result.report.summary()
    trace = RoutingTrace(np.ascontiguousarray(tokens.transpose(1, 0, 2)), 16)
    loss = without_gpus(trace, result.expert_map, topology, rule, gone)
    assert not loss.experts_lost.any() and not loss.tokens_hit.any()
    assert (loss.rest_gpu_fanout <= 4 - len(gone)).all() and (loss.rest_load_max_over_mean >= 1).all()


def test_few_slots_keep_the_hottest_experts_and_the_report_says_what_is_lost():
    tokens, topology = hot_tokens(7), Topology(4)
    window = window_of(tokens, 16)
    result = plan(window, topology, 20, PlannerConfig(survive="rank"))
    lost = uncovered(result.expert_map.physical_to_logical[0], window.counts[0], topology, "rank")
    assert set(np.flatnonzero(~lost)) == set(np.argsort(-window.counts[0], kind="stable")[:4])
    assert result.report.uncovered is not None
    assert result.report.uncovered[0].tolist() == [12, window.counts[0, lost].sum() / window.counts[0].sum()]
    assert "12 experts with" in result.report.summary()


def test_tokens_go_on_without_the_experts_of_a_lost_gpu():
    """Slots 0 1 | 2 0 on two GPUs: without the second only expert 2 is gone."""
    trace = RoutingTrace(np.array([[[0, 1]], [[1, 2]], [[2, 0]], [[0, 1]]], np.int16), 3)
    expert_map = ExpertMap(np.array([[0, 1, 2, 0]]), 3)
    loss = without_gpus(trace, expert_map, Topology(2), "cover", [1])
    assert loss.experts_lost.tolist() == [1] and loss.tokens_hit.tolist() == [0.5]
    assert loss.rest_gpu_fanout.tolist() == [1.0] and loss.rest_load_max_over_mean.tolist() == [1.0]
    with pytest.raises(InputError, match="none would be left"):
        without_gpus(trace, expert_map, Topology(2), "cover", [0, 1])


def test_memory_says_which_redundancies_to_try_and_the_knee_which_to_take():
    assert slots_within(8e9, 40e6, 50) == 4
    assert redundancies_within(16, 8, 4) == [0, 8, 16]
    assert redundancies_within(16, 4, 99)[-1] == 48  # every expert on every GPU; more is of no use
    with pytest.raises(InputError, match="need 2"):
        redundancies_within(16, 8, 1)
    assert knee([1, 2, 3, 4], [0, 8, 9, 10]) == 1
    assert knee([1, 2, 3, 4], [5, 4, 3, 2]) == 0
    assert knee([1, 2, 3], [0, 0, 10]) == 2
    # What loses is no better than not switching, however steeply the loss falls.
    assert knee([1, 2, 3, 4, 5], [-60, -15, -6, 5, 15]) == 4 and knee([1, 2, 3, 4], [-60, -9, 10, 11]) == 2
    assert knee([1, 2, 3, 4], [-60, -9, -6, -5]) == 1
    assert slots_within(1e300 * 1e9, 40e6, 50) > 1e9 and slots_within(8e9, 1e-300, 50) > 1e9
    window = window_of(hot_tokens(8), 16)
    rows, at = try_redundancies(window, Topology(4), PlannerConfig(), [0, 16, 48])
    assert rows[-1].gpu_fanout == pytest.approx(1.0) and rows[0].cost > rows[1].cost > rows[2].cost and at > 0


def test_replicas_that_are_missing_are_made_though_they_gain_nothing():
    """A round with a minimum gain of all: only the layer whose map in force loses experts moves."""
    window, topology = window_of(hot_tokens(9, 2), 16), Topology(4)
    safe = plan(window, topology, 36, PlannerConfig(survive="rank")).expert_map.physical_to_logical
    unsafe = plan(window, topology, 36, PlannerConfig()).expert_map.physical_to_logical
    current = ExpertMap(np.stack([safe[0], unsafe[1]]), 16)
    assert uncovered(unsafe[1], window.counts[1], topology, "rank").any()
    config = PlannerConfig(survive="rank", minimum_gain=0.99, warm_start=True)
    result = plan(window, topology, 36, config, current)
    assert (result.expert_map.physical_to_logical[0] == safe[0]).all()
    assert result.report.uncovered is not None and not result.report.uncovered.any()


@pytest.mark.parametrize(
    ("gpus", "nodes", "experts", "redundancies"),
    [
        (8, 2, 64, (0, 8, 16, 40, 64)),
        (16, 4, 64, (0, 16, 32, 64)),
        (8, 1, 128, (0, 8, 16, 128)),
        (72, 1, 128, (16, 88)),
    ],
)
def test_more_slots_never_cost_more_at_the_shapes_of_servers(gpus, nodes, experts, redundancies):  # type: ignore[no-untyped-def]
    """Top-8 of one layer: what is added to the slots is found and used, while no GPU is loaded over the cap."""
    window = window_of(skewed_tokens(np.random.default_rng(1), 1, 1200, experts, 8), experts)
    reports = [plan(window, Topology(gpus, nodes), experts + number).report for number in redundancies]
    costs = [float(report.planned.cost[0]) for report in reports]
    assert (np.diff(costs) <= 0).all(), costs
    for report in reports:
        assert report.planned.load_max_over_mean[0] <= report.eplb.load_max_over_mean[0] + 0.12


def test_without_a_token_sample_a_better_balanced_map_in_force_stays():
    counts = np.array([[38, 19, 27, 36, 29, 1]], np.int64)
    in_force = ExpertMap(np.array([[1, 4, 2, 3, 0, 5]], np.int32), 6)
    result = plan(RoutingWindow(counts), Topology(2), 6, current=in_force)
    assert result.report.fallback == (IN_USE_BETTER,)
    assert (result.expert_map.physical_to_logical == in_force.physical_to_logical).all()
