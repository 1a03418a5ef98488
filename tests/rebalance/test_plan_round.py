"""What the planner process answers, and its parent's time limit and restarts."""

import os
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement
from sglang_eplb_affinity.rebalance.plan_round import PlanRequest, PlanSettings, layer_gains, plan_round
from sglang_eplb_affinity.rebalance.planner_client import PlannerFailed, PlannerProcess

LAYERS, EXPERTS, SLOTS = 3, 16, 20
TOPOLOGY = Topology(4)
CURRENT = ExpertMap.contiguous(LAYERS, EXPERTS, SLOTS)
SETTINGS = PlanSettings("affinity", PlannerConfig(dispatch="dynamic", minimum_gain=0.01), TOPOLOGY, staging_rows=5)


def window(seed: int = 0, tokens: int = 600) -> RoutingWindow:
    """Skewed, and with partners: experts e and e + 8 fire together. Layer 2 has no traffic."""
    random = np.random.default_rng(seed)
    first = np.minimum(random.geometric(0.25, (tokens, LAYERS)) - 1, 7)
    ids = np.stack([first, first + 8], 2).astype(np.int16)
    found = RoutingWindow.from_trace(RoutingTrace(ids, EXPERTS))
    counts, sample = found.counts.copy(), found.tokens.copy()  # type: ignore[union-attr]
    counts[2], sample[2] = 0, -1
    return RoutingWindow(counts, None, sample)


def request(**settings: object) -> PlanRequest:
    return PlanRequest(window(), CURRENT, replace(SETTINGS, **settings), first=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", ["affinity", "deepseek", "deepseek_hierarchical"])
def test_a_plan_moves_layers_that_gain(algorithm: str) -> None:
    reply = plan_round(request(algorithm=algorithm, expert_groups=4))
    assert reply.result == "planned" and {plan.layer for plan in reply.layers} <= {0, 1}
    assert reply.before is not None and reply.after is not None and reply.routing_checksum
    assert reply.after.balancedness > reply.before.balancedness
    rows = CURRENT.physical_to_logical.copy()
    for plan in reply.layers:
        assert ((plan.source >= 0) == (plan.slots != rows[plan.layer])).all()
        rows[plan.layer] = plan.slots
    ExpertMap(rows, EXPERTS)  # every expert still has a replica
    gains, _ = layer_gains(window(), CURRENT, ExpertMap(rows, EXPERTS), replace(SETTINGS, algorithm=algorithm))  # type: ignore[arg-type]
    order = [gains[plan.layer] for plan in reply.layers]
    assert order == sorted(order, reverse=True) and min(order) >= 0.01


def test_deepseek_balances_as_eplb_does_with_fewer_moves() -> None:
    reply = plan_round(request(algorithm="deepseek"))
    eplb = eplb_placement(window().counts, TOPOLOGY, SLOTS).physical_to_logical
    for plan in reply.layers:
        load = [np.sort((window().counts[plan.layer] / np.bincount(row))[row].reshape(4, -1).sum(1))
                for row in (plan.slots, eplb[plan.layer])]  # fmt: skip
        assert np.allclose(*load)
        assert (plan.source >= 0).sum() <= (eplb[plan.layer] != CURRENT.physical_to_logical[plan.layer]).sum()


@pytest.mark.parametrize("algorithm", ["affinity", "deepseek"])
def test_a_gain_below_the_threshold_moves_nothing(algorithm: str) -> None:
    reply = plan_round(request(algorithm=algorithm, planner=replace(SETTINGS.planner, minimum_gain=0.999)))
    assert reply.result == "unchanged" and "no layer gains 99.90%" in (reply.reason or "")


def test_a_layer_that_does_not_fit_the_staging_buffer_stays() -> None:
    assert plan_round(request(algorithm="deepseek", staging_rows=1)).result == "unchanged"


def test_a_move_cap_holds_from_the_first_round_on() -> None:
    capped = replace(SETTINGS.planner, max_moves=2)
    reply = plan_round(request(planner=capped, staging_rows=2))
    assert reply.layers
    for plan in reply.layers:
        assert (plan.source >= 0).reshape(4, -1).sum(1).max() <= 2


def test_nothing_recorded_is_skipped() -> None:
    empty = RoutingWindow(np.zeros((LAYERS, EXPERTS), np.int64), None, np.full((LAYERS, 4, 2), -1, np.int16))
    assert plan_round(PlanRequest(empty, CURRENT, SETTINGS)).result == "skipped"


@pytest.fixture
def planner():
    process = PlannerProcess(SETTINGS, 60)
    yield process
    process.close()


def test_the_process_plans_as_this_one_would(planner: PlannerProcess) -> None:
    here, there = plan_round(request()), planner.plan(request())
    assert [plan.layer for plan in there.layers] == [plan.layer for plan in here.layers]
    assert all((a.slots == b.slots).all() for a, b in zip(here.layers, there.layers, strict=True))
    assert planner.starts == 1
    wrong = PlanRequest(window(), ExpertMap.contiguous(2, EXPERTS, SLOTS), SETTINGS)
    assert planner.plan(wrong).result == "failed"
    assert planner.plan(request()).result == "planned" and planner.starts == 1


def test_a_process_that_is_killed_while_it_plans_is_replaced(planner: PlannerProcess) -> None:
    assert planner.wait_until_ready(60)
    pid = planner.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # it must not answer before it is killed
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(PlannerFailed, match=r"ended \(signal 9\)"):
        planner.plan(request())
    assert planner.plan(request()).result == "planned"
    assert planner.starts == 2 and planner.pid != pid


def test_a_process_that_does_not_answer_in_time_is_replaced() -> None:
    planner = PlannerProcess(SETTINGS, 60)
    try:
        assert planner.wait_until_ready(60)
        planner._limit = 0.3
        assert planner.pid is not None
        os.kill(planner.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(PlannerFailed, match=r"no plan within 0.3 s"):
            planner.plan(request())
        assert time.monotonic() - began < 5
        planner._limit = 60
        assert planner.plan(request()).result == "planned"
    finally:
        planner.close()


def test_a_planner_that_cannot_start_says_so() -> None:
    planner = PlannerProcess(SETTINGS, 20, module="sglang_eplb_affinity.no_such_module")
    try:
        for _ in range(2):
            with pytest.raises(PlannerFailed, match=r"ended \(exit code 1\)"):
                planner.plan(request())
    finally:
        planner.close()
