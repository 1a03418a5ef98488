"""The record of a round: its line, its figures, and that observers cannot hurt."""

import json
import logging

import numpy as np
import pytest

from bench.figures.rebalance_log import parse_log
from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.rebalance.round_record import RoundRecord, report, routing_checksum


def window(seed: int = 0) -> RoutingWindow:
    random = np.random.default_rng(seed)
    ids = np.stack([random.permutation(8)[:2] for _ in range(100)]).reshape(100, 1, 2).astype(np.int16)
    return RoutingWindow.from_trace(RoutingTrace(ids, 8))


def test_the_line_is_read_back_by_the_benchmark(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    expert_map = ExpertMap.contiguous(1, 8, 8)
    figures = MapFigures.of(window(), expert_map, Topology(4, 2), "dynamic")
    record = RoundRecord("applied", "affinity", 3, "asynchronous", 200, 2, 1 << 20, (0,), figures, figures)
    report(record, expert_map, [])
    (line,) = [r.getMessage() for r in caplog.records]
    (found,) = parse_log(line).rebalances
    assert (found.result, found.round, found.moved_experts, found.moved_layers) == ("applied", 3, 2, 1)
    assert figures is not None and found.gpu_fanout_before == round(figures.gpu_fanout, 4)
    assert json.loads(line.split("rebalance ", 1)[1])["moved_bytes"] == 1 << 20


def test_remote_copies_take_tokens_to_come_from_all_gpus() -> None:
    # Each token visits GPU 0 and GPU 1 of four on two nodes: from GPU 0 or 1 one copy is remote, from 2 or 3 both.
    ids = np.tile(np.array([[[0, 2]]], np.int16), (8, 1, 1))
    figures = MapFigures.of(
        RoutingWindow.from_trace(RoutingTrace(ids, 8)), ExpertMap.contiguous(1, 8, 8), Topology(4, 2), "dynamic"
    )
    assert figures is not None
    assert (figures.gpu_fanout, figures.node_fanout) == (2.0, 1.0)
    assert (figures.remote_gpu_copies, figures.remote_node_copies) == (1.5, 0.5)


@pytest.mark.parametrize("rule", ["static", "cover"])
def test_rules_that_prefer_near_replicas_are_judged_by_where_tokens_are(rule: DispatchRule) -> None:
    # Both GPUs hold all of a token's experts: none leaves its own. Expert 4 is on GPU 1 alone: half of the tokens do.
    everywhere = ExpertMap(np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 5]]), 6)
    for experts, remote in (([0, 2], 0.0), ([0, 4], 0.5)):
        ids = np.tile(np.array([[experts]], np.int16), (8, 1, 1))
        found = MapFigures.of(RoutingWindow.from_trace(RoutingTrace(ids, 6)), everywhere, Topology(2, 2), rule)
        assert found is not None
        assert (found.remote_gpu_copies, found.remote_node_copies) == (remote, remote)


def test_no_sample_gives_no_figures() -> None:
    found = RoutingWindow(np.ones((1, 8), np.int64))
    assert MapFigures.of(found, ExpertMap.contiguous(1, 8, 8), Topology(4), "dynamic") is None


def test_a_failing_observer_is_logged_and_the_next_one_is_told(caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[int, ExpertMap]] = []

    class Fails:
        def round_finished(self, record: RoundRecord, in_force: ExpertMap) -> None:
            raise RuntimeError("planted")

    class Listens:
        def round_finished(self, record: RoundRecord, in_force: ExpertMap) -> None:
            told.append((record.round, in_force))

    expert_map = ExpertMap.contiguous(1, 8, 8)
    report(RoundRecord("unchanged", "affinity", 5), expert_map, [Fails(), Listens()])
    assert told == [(5, expert_map)] and "Fails failed on round 5" in caplog.text


def test_the_checksum_follows_the_routing() -> None:
    assert routing_checksum(window(1)) == routing_checksum(window(1)) != routing_checksum(window(2))


def test_threads_change_no_figure() -> None:
    random = np.random.default_rng()
    ids = np.argsort(random.random((500, 6, 8)), axis=2)[:, :, :3].astype(np.int16)
    found = RoutingWindow.from_trace(RoutingTrace(ids, 8))
    expert_map = ExpertMap(np.tile(random.permutation(12) % 8, (6, 1)), 8)
    alone, together = (MapFigures.of(found, expert_map, Topology(4, 2), "static", threads) for threads in (1, 4))
    assert alone == together is not None
