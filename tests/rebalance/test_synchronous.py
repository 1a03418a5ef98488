"""One synchronous round: what is skipped, what fails, and what the record says."""

import dataclasses
import gc
import os
import tracemalloc

import numpy as np
import pytest

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig
from sglang_eplb_affinity.rebalance import plan_round
from sglang_eplb_affinity.rebalance.plan_round import PlanSettings
from sglang_eplb_affinity.rebalance.round_record import RoundRecord
from sglang_eplb_affinity.rebalance.synchronous import SynchronousRounds

LAYERS, EXPERTS, SLOTS = 2, 8, 12
HOME = ExpertMap.contiguous(LAYERS, EXPERTS, SLOTS)
PLANNER = PlannerConfig(dispatch="dynamic", warm_start=True, minimum_gain=0.02)
SIZES = {0: 52, 1: 52}


class Rounds(SynchronousRounds):
    """Rounds that keep what they report."""

    def __init__(self) -> None:
        self.records: list[RoundRecord] = []
        plans = PlanSettings("affinity", PLANNER, Topology(4, 2))
        super().__init__(plans, "affinity", lambda record, after: self.records.append(record), "cpu")


def some_window() -> RoutingWindow:
    random = np.random.default_rng(0)
    ids = np.stack([random.permutation(EXPERTS)[:3] for _ in range(400 * LAYERS)]).reshape(400, LAYERS, 3)
    ids[:200, :, 0], ids[:200, :, 1], ids[:200, :, 2] = 0, 5, 7  # half of the tokens choose the same three
    return RoutingWindow.from_trace(RoutingTrace(ids.astype(np.int16), EXPERTS))


def test_an_empty_window_keeps_the_map() -> None:
    rounds = Rounds()
    empty = RoutingWindow(
        np.zeros((LAYERS, EXPERTS), np.int64),
        np.zeros((LAYERS, EXPERTS, EXPERTS), np.int64),
        np.full((LAYERS, 16, 3), -1, np.int16),
    )
    assert rounds.begin(empty, HOME).plan() is None
    assert [(record.result, record.reason) for record in rounds.records] == [("skipped", "no tokens recorded")]


def test_a_failing_planner_keeps_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(plan_round, "plan", fail)
    rounds = Rounds()
    assert rounds.begin(some_window(), HOME).plan() is None
    assert [(record.result, record.reason) for record in rounds.records] == [("failed", "RuntimeError: planted")]


def test_a_plan_is_recorded_with_both_maps_and_the_next_keeps_it() -> None:
    rounds = Rounds()
    found = rounds.begin(some_window(), HOME)
    planned = found.plan()
    assert planned is not None and not rounds.planned
    found.finish(planned, SIZES)
    (record,) = rounds.records
    assert record.result == "applied" and record.moved_experts > 0 and record.round == 1 and rounds.planned
    assert record.tokens == 400 * 3 and record.moved_bytes == record.moved_experts * 52
    assert record.contiguous == record.before and record.before is not None and record.after is not None
    assert 1 <= record.after.gpu_fanout <= 3 and 1 <= record.before.gpu_fanout <= 3
    assert 0 < record.before.balancedness <= record.after.balancedness <= 1
    assert rounds.begin(some_window(), planned).plan() is None
    second = rounds.records[1]
    assert (second.result, second.moved_experts, second.reason) == ("unchanged", 0, "no layer gains 2.00%")


def test_layers_without_experts_do_not_count_as_moved() -> None:
    rounds = Rounds()
    swapped = ExpertMap(HOME.physical_to_logical[:, ::-1].copy(), EXPERTS)
    rounds.begin(some_window(), HOME).finish(swapped, {1: 52})
    (record,) = rounds.records
    assert record.committed_layers == (1,) and 0 < record.moved_experts <= SLOTS


def test_a_first_round_ignores_the_cap_on_moves_as_no_planned_map_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PlannerConfig] = []
    plan = plan_round.plan
    monkeypatch.setattr(plan_round, "plan", lambda *args: (seen.append(args[3]), plan(*args))[1])
    rounds = Rounds()
    rounds.settings = PlanSettings("affinity", PlannerConfig(max_moves=1, warm_start=True), Topology(4, 2))
    found = rounds.begin(some_window(), HOME)
    planned = found.plan()
    assert planned is not None
    found.finish(planned, SIZES)
    rounds.begin(some_window(), planned).plan()
    assert [(config.max_moves, config.warm_start) for config in seen] == [(None, False), (1, True)]


def test_200_rounds_keep_nothing() -> None:
    """Of windows, maps, histories and files. The moves of weights between them are SGLang's own."""
    random = np.random.default_rng(3)
    windows = []
    for _ in range(8):  # each with other pairs of experts that tokens choose together
        pairs = random.permutation(EXPERTS).reshape(-1, 2)
        ids = pairs[random.integers(0, len(pairs), (120, LAYERS))]
        windows.append(RoutingWindow.from_trace(RoutingTrace(ids.astype(np.int16), EXPERTS)))
    plans = PlanSettings("affinity", dataclasses.replace(PLANNER, threads=1), Topology(4, 2))
    results: list[str] = []
    rounds = SynchronousRounds(plans, "affinity", lambda record, after: results.append(record.result), "cpu")
    in_force, held = HOME, []
    tracemalloc.start()
    try:
        for number in range(200):
            now = rounds.begin(windows[number % 8], in_force)
            planned = now.plan()
            if planned is not None:
                now.finish(planned, SIZES)
                in_force = planned
            if number in (99, 199):
                gc.collect()
                held.append((tracemalloc.get_traced_memory()[0], len(os.listdir("/proc/self/fd"))))
    finally:
        tracemalloc.stop()
    assert results.count("applied") >= 100 and "failed" not in results
    (early, descriptors), (late, descriptors_late) = held
    assert late - early < 100_000, f"{late - early} bytes more after 100 further rounds"
    assert descriptors_late <= descriptors
