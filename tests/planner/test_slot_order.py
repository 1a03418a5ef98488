"""A plan's order of slots keeps no move from happening where few slots may change at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sglang_eplb_affinity.dispatch.primaries import uneven_layers
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, plan
from sglang_eplb_affinity.planner.slot_order import in_order
from sglang_eplb_affinity.rebalance.layer_moves import rank_table
from sglang_eplb_affinity.rebalance.plan_round import PlanRequest, PlanSettings, plan_round

TRACE = Path(__file__).parents[2] / "bench/data/tiny_moe_plan.npz"
TOPOLOGY, SLOTS, STAGED = Topology(16, 4), 96, 2


@pytest.fixture(scope="module")
def windows() -> tuple[RoutingWindow, RoutingWindow]:
    trace = RoutingTrace.load(TRACE)
    ids = np.ascontiguousarray(trace.topk_ids.transpose(1, 0, 2)).astype(np.int16)

    def window(start: int, end: int) -> RoutingWindow:
        tokens = ids[:, start:end]
        counts = np.stack([np.bincount(layer.ravel(), minlength=trace.num_experts) for layer in tokens])
        return RoutingWindow(counts, None, tokens)

    third = trace.num_tokens // 3
    return window(0, third), window(2 * third, 3 * third)


def changed(new: ExpertMap, old: ExpertMap) -> np.ndarray:
    """int64 [layers]: slots of the GPU that has most of them changed."""
    differs = new.physical_to_logical != old.physical_to_logical
    return np.asarray(differs.reshape(len(differs), TOPOLOGY.num_gpus, -1).sum(2).max(1))


@pytest.mark.parametrize("further", [0, 1])
def test_what_there_is_memory_to_stage_bounds_the_order_too(
    windows: tuple[RoutingWindow, RoutingWindow], further: int
) -> None:
    config = PlannerConfig(objective="mixed", dispatch="primary", further_slots=further, threads=2)
    current = plan(windows[0], TOPOLOGY, SLOTS, config).expert_map
    config = replace(config, incremental=True, warm_start=True, max_moves=STAGED)
    unbounded = plan(windows[1], TOPOLOGY, SLOTS, config, current).expert_map
    assert (changed(unbounded, current) > STAGED).any()  # best orders move more than the plan does
    settings = PlanSettings("affinity", config, TOPOLOGY, staging_rows=STAGED, served="primary")
    reply = plan_round(PlanRequest(windows[1], current, settings))
    moved = [layer.layer for layer in reply.layers]
    assert sorted(moved) == np.flatnonzero(changed(unbounded, current)).tolist()  # none waits for ever
    rows = current.physical_to_logical.copy()
    for layer in reply.layers:
        rows[layer.layer] = layer.slots
        table = rank_table(layer.replicas, TOPOLOGY, SLOTS, "primary", further)
        assert np.array_equal(layer.static_choice, table)  # type: ignore[arg-type]
    after = ExpertMap(rows, current.num_experts)
    assert 0 < changed(after, current).max() <= STAGED
    assert not len(uneven_layers(after, TOPOLOGY))


def test_the_best_order_that_may_be_is_taken(windows: tuple[RoutingWindow, RoutingWindow]) -> None:
    config = PlannerConfig(dispatch="primary", further_slots=1, threads=2)
    planned = plan(windows[0], TOPOLOGY, SLOTS, config).expert_map.physical_to_logical[0]
    counts = windows[0].counts[0]
    assert (in_order(planned, counts, TOPOLOGY, config, planned) == planned).all()
    mixed = planned.reshape(TOPOLOGY.num_gpus, -1)[:, ::-1].ravel()  # the same experts on every GPU
    assert (in_order(mixed, counts, TOPOLOGY, config, None) != mixed).any()
    assert (in_order(mixed, counts, TOPOLOGY, replace(config, max_changes=0), mixed) == mixed).all()
    other = PlannerConfig(threads=2)
    assert in_order(mixed, counts, TOPOLOGY, other, None) is mixed
