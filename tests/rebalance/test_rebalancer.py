"""The state machine with ranks in one process: agreement, commits, what a failure leaves, and the knobs."""

import logging
import threading
import time

import numpy as np
import pytest

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.rebalance.config import AsyncConfig
from sglang_eplb_affinity.rebalance.layer_moves import LayerJob
from sglang_eplb_affinity.rebalance.plan_round import PlanReply
from sglang_eplb_affinity.rebalance.rebalancer import Phase
from tests.rebalance.fakes import LAYERS, RANKS, Cluster, random_map


def cluster(rounds: int = 3, **settings: object) -> Cluster:
    values = {"interval": 5, "layers_in_flight": 2, **settings}
    return Cluster(AsyncConfig(**values), [random_map(seed) for seed in range(rounds)])  # type: ignore[arg-type]


def slots_of(found: Cluster) -> np.ndarray:
    return found.ranks[0].slots.numpy()


@pytest.mark.parametrize("layers_in_flight", [1, 2, 8])
def test_rounds_put_the_planned_maps_in_force_on_all_ranks(layers_in_flight: int) -> None:
    found = cluster(layers_in_flight=layers_in_flight)
    found.run(lambda: len(found.records) >= 3)
    assert (slots_of(found) == found.targets[2]).all()
    for record in found.records[:3]:
        assert (record.result, record.mode) == ("applied", "asynchronous")
        assert len(record.committed_layers) == len(record.commit_ms) == LAYERS
        assert record.moved_experts > 0 and record.moved_bytes == record.moved_experts * (6 * 4 + 5)
        assert record.passes >= 4 and record.phase_seconds["move"] > 0


def test_a_layer_is_committed_by_all_ranks_at_the_same_pass() -> None:
    found = cluster()
    slow = {"layer": 2}

    def before(rank: int, job: LayerJob) -> None:
        if rank == 1 and job.layer == slow["layer"]:
            time.sleep(0.05)

    found.before_transfer = before
    found.run(lambda: len(found.records) >= 2)
    assert found.ranks[0].commits == found.ranks[1].commits == found.ranks[2].commits
    assert len({at for at, _ in found.ranks[0].commits}) > 1


def test_no_layer_is_committed_before_the_slowest_rank_has_staged_it() -> None:
    found = cluster()
    gate = threading.Event()

    def before(rank: int, job: LayerJob) -> None:
        if rank == 2:
            gate.wait(5)

    found.before_transfer = before
    for _ in range(60):
        found.step()
    assert found.phase is Phase.MOVING and not found.ranks[0].commits
    gate.set()
    found.run(lambda: len(found.records) >= 1)
    assert found.records[0].result == "applied"


def test_an_exception_in_a_transfer_gives_up_the_layers_that_are_not_committed(caplog) -> None:
    found = cluster(layers_in_flight=1)
    calls: list[int] = []

    def before(rank: int, job: LayerJob) -> None:
        if rank == 1:
            calls.append(job.layer)
            if len(calls) == 3:
                raise RuntimeError("planted")

    found.before_transfer = before
    found.run(lambda: len(found.records) >= 2)
    failed, next_round = found.records[:2]
    assert failed.result == "failed" and failed.committed_layers == (0, 1) and failed.after is None
    assert failed.reason == "movement failed on rank 1; its log says why"
    assert "movement failed on rank 1: layer 2: RuntimeError: planted" in caplog.text
    assert next_round.result == "applied" and (slots_of(found) == found.targets[1]).all()


def test_planning_that_fails_on_one_rank_fails_the_round_everywhere() -> None:
    found = cluster()
    found.planning_error[2] = RuntimeError("planted")
    found.run(lambda: len(found.records) >= 1)
    assert found.records[0].reason == "planning failed on rank 2; its log says why"
    found.run(lambda: len(found.records) >= 2)
    assert found.records[1].result == "applied"


def test_rank_0_gives_its_own_reason() -> None:
    found = cluster()
    found.planning_error = dict.fromkeys(range(RANKS), RuntimeError("planted"))
    found.run(lambda: len(found.records) >= 1)
    assert found.records[0].reason == "planning failed on rank 0: RuntimeError: planted"


@pytest.mark.parametrize("result", ["failed", "skipped", "unchanged"])
def test_a_reply_without_layers_ends_the_round(result: str) -> None:
    found = cluster()
    found.replies = [PlanReply(result, "because")]  # type: ignore[arg-type]
    before = slots_of(found).copy()
    found.run(lambda: len(found.records) >= 2)
    assert [(r.result, r.reason) for r in found.records[:2]] == [(result, "because")] * 2
    assert (slots_of(found) == before).all()


def test_a_recorder_that_cannot_be_read_does_not_keep_the_others_waiting(caplog) -> None:
    found = cluster()
    found.ranks[1].window.failure = RuntimeError("planted")
    for rank in found.ranks:
        plan = rank.rebalancer._parts.plan
        object.__setattr__(
            rank.rebalancer._parts,
            "plan",
            lambda share, current, first, plan=plan: (
                share.wait() if "NoShare" in repr(share) else plan(share, current, first)
            ),
        )
    found.run(lambda: len(found.records) >= 1)
    assert found.records[0].result == "failed" and "rank 1 could not read its recorder" in caplog.text


def test_interval_and_warm_up() -> None:
    found = cluster(interval=20, warm_up=7)
    found.replies = [PlanReply("unchanged")]
    for _ in range(70):
        found.step()
    for rank in found.ranks:
        # What the warm-up passes recorded is forgotten; later windows start where the last one was taken.
        assert rank.window.starts == [7] and rank.window.takes == 3
    without = cluster(interval=20)
    without.replies = [PlanReply("unchanged")]
    for _ in range(50):
        without.step()
    assert without.ranks[0].window.starts == [] and without.ranks[0].window.takes == 2


def test_a_round_that_outlasts_the_interval_is_followed_by_the_next_one() -> None:
    found = cluster(interval=3)
    found.before_transfer = lambda rank, job: time.sleep(0.01)
    found.run(lambda: len(found.records) >= 3)
    assert all(record.result == "applied" and record.passes > 3 for record in found.records)


def test_run_once_freezes_after_the_first_round_that_was_applied() -> None:
    found = cluster(run_once=True)
    found.planning_error = dict.fromkeys(range(RANKS), RuntimeError("planted"))
    found.run(lambda: found.phase is Phase.FROZEN)
    for _ in range(30):
        found.step()
    assert [record.result for record in found.records] == ["failed", "applied"]
    assert (slots_of(found) == found.targets[1]).all()


def test_the_watchdog_names_the_phase_and_the_round_is_given_up(caplog) -> None:
    found = cluster(phase_limit_seconds=0.05)
    gate = threading.Event()
    found.before_transfer = lambda rank, job: gate.wait(10) and None if rank == 1 else None
    found.run(lambda: found.phase is Phase.MOVING)
    time.sleep(0.1)
    for rank in found.ranks:
        rank.rebalancer.check_time()
    assert "on rank 1: moving layer" in caplog.text and "on rank 0" not in caplog.text
    for _ in range(10):
        found.step()
    assert found.phase is Phase.ENDING, "the stuck copy may still read weights: no next round yet"
    gate.set()
    found.run(lambda: len(found.records) >= 1)
    assert found.records[0].reason == "time limit failed on rank 1; its log says why"
    found.run(lambda: len(found.records) >= 2)
    assert found.records[1].result == "applied"


def test_an_idle_server_is_no_hang(caplog) -> None:
    found = cluster(phase_limit_seconds=0.05)
    caplog.set_level(logging.ERROR)
    found.run(lambda: found.phase is Phase.MOVING)
    time.sleep(0.2)  # no passes
    for rank in found.ranks:
        rank.rebalancer.check_time()
    assert not caplog.records
    found.run(lambda: len(found.records) >= 1)
    assert found.records[0].result == "applied"


def test_new_weights_drop_what_is_staged() -> None:
    found = cluster()
    gate = threading.Event()
    found.before_transfer = lambda rank, job: gate.wait(10) and None
    found.run(lambda: found.phase is Phase.MOVING)
    found.step()
    for rank in found.ranks:
        rank.rebalancer.weights_changed()
    for _ in range(6):
        found.step()
    assert found.phase is Phase.ENDING and not found.ranks[0].commits
    gate.set()
    found.run(lambda: len(found.records) >= 2)
    assert found.records[0].reason == "the model's weights were updated"
    assert found.records[1].result == "applied"


@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        ("interval", 0, "--eplb-rebalance-num-iterations 0: must be at least 1"),
        ("warm_up", -1, "--eplb-async-warm-up-passes -1: must be 0 or more"),
        ("layers_in_flight", 0, "--eplb-async-layers-in-flight 0: must be at least 1"),
        ("phase_limit_seconds", 0, "--eplb-async-phase-limit 0: must be above 0 seconds"),
    ],
)
def test_settings_out_of_range_are_named(setting: str, value: float, text: str) -> None:
    with pytest.raises(InputError, match=text.split(":")[0]) as error:
        AsyncConfig(**{"interval": 5, setting: value})  # type: ignore[arg-type]
    assert text in str(error.value)
