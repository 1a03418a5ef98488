"""Plans with a map in force: caps on moves, gains that pay, warm starts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_eplb_affinity.dispatch.evaluate import moved_experts
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan
from sglang_eplb_affinity.planner.judge import Judgement, worth_moving
from sglang_eplb_affinity.planner.plan_layer import LITTLE_GAIN
from tests.planner.windows import RELAXED, problems, skewed_tokens, window_of

ROOT = Path(__file__).parents[2]


@RELAXED
@given(problems(), st.integers(0, 3))
def test_moves_stay_under_the_cap(problem, max_moves):  # type: ignore[no-untyped-def]
    window, topology, slots = problem
    start = eplb_placement(window.counts[:, ::-1], topology, slots)
    result = plan(window, topology, slots, PlannerConfig(max_moves=max_moves), start)
    before = start.physical_to_logical.reshape(window.num_layers, topology.num_gpus, -1)
    after = result.expert_map.physical_to_logical.reshape(before.shape)
    for layer in range(window.num_layers):
        for gpu in range(topology.num_gpus):
            assert len(set(after[layer, gpu].tolist()) - set(before[layer, gpu].tolist())) <= max_moves
    assert (result.report.moved_experts == moved_experts(start, result.expert_map, topology)).all()


@pytest.mark.parametrize("rule", ["cover", "dynamic"])
@pytest.mark.parametrize("effort", ["fast", "thorough"])
def test_rounds_with_few_moves_change_replicas_until_the_load_is_eplbs(rule, effort):  # type: ignore[no-untyped-def]
    window = window_of(skewed_tokens(np.random.default_rng(11), 2, 2000, 32, 4), 32)
    topology, config = Topology(8, 2), PlannerConfig(dispatch=rule, effort=effort, max_moves=1)
    in_use = ExpertMap.contiguous(2, 32, 40)
    replicated = in_use.replica_counts() > 1
    for number in range(6):
        result = plan(window, topology, 40, config, in_use)
        before, after = (m.physical_to_logical.reshape(2, 8, 5) for m in (in_use, result.expert_map))
        for layer in range(2):
            for gpu in range(8):
                assert len(set(after[layer, gpu].tolist()) - set(before[layer, gpu].tolist())) <= 1
        assert (result.expert_map.replica_counts() >= 1).all()
        if number == 0:
            assert result.report.current is not None and result.report.current.load_max_over_mean.min() > 1.3
            assert (result.report.planned.load_max_over_mean < result.report.current.load_max_over_mean).all()
        in_use = result.expert_map
    assert ((in_use.replica_counts() > 1) != replicated).any(1).all()
    assert (result.report.planned.load_max_over_mean <= result.report.eplb.load_max_over_mean + 0.06).all()


def test_replanning_the_same_window_moves_nothing_that_does_not_pay():
    tokens = skewed_tokens(np.random.default_rng(8), 2, 2000, 32, 4)
    window = window_of(tokens, 32)
    first = plan(window, Topology(8, 2), 32).expert_map
    again = plan(window, Topology(8, 2), 32, PlannerConfig(incremental=True), first).report
    assert again.moved_experts is not None and again.moved_experts.sum() <= 4
    free = plan(window, Topology(8, 2), 32, PlannerConfig(incremental=True, move_cost=0), first).report
    costly = plan(window, Topology(8, 2), 32, PlannerConfig(incremental=True, move_cost=10**6), first).report
    assert costly.moved_experts is not None and costly.moved_experts.sum() == 0
    assert free.current is not None and (free.planned.cost <= free.current.cost + 1e-9).all()


@pytest.mark.parametrize("rule", ["static", "cover", "dynamic"])
def test_a_layer_moves_only_for_the_gain_asked_for(rule):  # type: ignore[no-untyped-def]
    tokens = skewed_tokens(np.random.default_rng(9), 3, 4000, 32, 4)
    earlier, later = window_of(tokens[:, ::2], 32), window_of(tokens[:, 1::2], 32)
    config = PlannerConfig(dispatch=rule, minimum_gain=0.02)
    home = ExpertMap.contiguous(3, 32, 40)
    first = plan(earlier, Topology(8, 2), 40, config, home)
    assert first.report.moved_experts is not None and (first.report.moved_experts > 0).all()
    half = replace(config, minimum_gain=0.5)
    again = plan(later, Topology(8, 2), 40, half, first.expert_map)
    assert again.report.fallback == (LITTLE_GAIN,) * 3
    assert (again.expert_map.physical_to_logical == first.expert_map.physical_to_logical).all()
    later_plan = plan(later, Topology(8, 2), 40, config, first.expert_map).report
    kept = np.array([reason == LITTLE_GAIN for reason in later_plan.fallback])
    now, before = later_plan.planned, later_plan.current
    assert before is not None and (now.cost[kept] == before.cost[kept]).all()
    gained = np.minimum(now.cost / before.cost, now.load_max_over_mean / before.load_max_over_mean)
    assert (gained[~kept] <= 0.98 + 1e-9).all()
    worse = plan(later, Topology(8, 2), 40, config, eplb_placement(later.counts, Topology(8, 2), 40)).report
    assert worse.fallback == ("",) * 3


@pytest.mark.parametrize("rule", ["static", "cover"])
def test_a_warm_start_refines_a_good_map_and_replaces_a_bad_one(rule):  # type: ignore[no-untyped-def]
    topology, ratios = Topology(8, 2), []
    for drawn, seed in itertools.product((12, 13, 14, 15), (0, 1)):  # a single plan is a few per cent of luck
        tokens = skewed_tokens(np.random.default_rng(drawn), 4, 4000, 32, 4)
        earlier, later = window_of(tokens[:, ::2], 32), window_of(tokens[:, 1::2], 32)
        cold = PlannerConfig(dispatch=rule, seed=seed)
        first = plan(earlier, topology, 40, cold).expert_map
        warm = plan(later, topology, 40, replace(cold, warm_start=True), first).report
        anew = plan(later, topology, 40, cold, first).report
        assert warm.moved_experts.sum() < anew.moved_experts.sum()
        assert (warm.planned.cost < warm.eplb.cost).all()
        ratios.append(warm.planned.cost.mean() / anew.planned.cost.mean())
    assert np.mean(ratios) < 1.02
    # EPLB's own map dispatches for no less than EPLB's: nothing to refine.
    bad = eplb_placement(later.counts, topology, 40)
    maps = [plan(later, topology, 40, replace(cold, warm_start=on), bad).expert_map for on in (True, False)]
    assert (maps[0].physical_to_logical == maps[1].physical_to_logical).all()


def test_a_current_map_over_the_cap_moves_for_load_alone():
    heavy = Judgement(cost=2.0, gpu_fanout=2.0, node_fanout=1.0, load=1.5)
    even = Judgement(cost=3.0, gpu_fanout=3.0, node_fanout=1.0, load=1.02)
    assert worth_moving(heavy, even, 1.1, 0.02) and not worth_moving(heavy, even, 1.6, 0.02)
    assert worth_moving(even, heavy, 1.1, 0.02)  # cheaper; that it is within the cap is the search's business
    assert not worth_moving(even, even, 1.1, 0.0)
