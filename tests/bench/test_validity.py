from typing import Any

import pytest

from bench.figures.rebalance_log import LogSummary, Rebalance, parse_log
from bench.figures.validity import void_reasons
from bench.harness.arms import ARMS
from bench.harness.profile import Profile
from sglang_eplb_affinity.rebalance import verify

GOOD = {"completed": 8, "output_tokens": 256, "mean_concurrency": 3.8, "whole_requests": 5, "timed_ttfts": 9}
GOOD |= {"client_cores": 0.3, "client_lag_p99_ms": 4.0, "p50_chunk_gap_ms": 20.0}
GOOD |= {"server_in_flight": 3.7, "server_queue": 0.0}
NOTHING = LogSummary((), 0)
MOVED = Rebalance("applied", moved_experts=3)
UNCHANGED = Rebalance("unchanged")


def reasons(arm: str, life: LogSummary, cell: LogSummary, error: str | None = None, **changed: Any) -> tuple[str, ...]:
    loop = {"requested": 8, "wanted_tokens": 256, "concurrency": 4, "open_loop": changed.pop("open_loop", False)}
    loop["held_back"] = changed.pop("held_back", 0.0)
    metrics = {**GOOD, **changed}
    return void_reasons(ARMS[arm], **loop, metrics=metrics, server_life=life, cell=cell, error=error)


def log(*rebalances: Rebalance) -> LogSummary:
    return LogSummary(rebalances, len(rebalances))


@pytest.mark.parametrize(
    ("arm", "life", "cell"),
    [
        ("none", NOTHING, NOTHING),
        ("vanilla", log(MOVED), log(MOVED)),
        # A placement that fits needs no further moves: it moved experts earlier, and the cell saw it checked.
        ("affinity", log(MOVED, UNCHANGED), log(UNCHANGED)),
    ],
)
def test_a_row_that_proves_its_claim_counts(arm: str, life: LogSummary, cell: LogSummary) -> None:
    assert reasons(arm, life, cell) == ()


@pytest.mark.parametrize(
    ("arm", "life", "cell", "why"),
    [
        ("none", log(MOVED), NOTHING, "1 rebalances in the log of an arm without EPLB"),
        ("vanilla", log(MOVED), NOTHING, "no rebalance during the cell"),
        ("vanilla", log(UNCHANGED), log(UNCHANGED), "no rebalance moved an expert"),
        ("affinity", log(MOVED, Rebalance("failed")), log(Rebalance("failed")), "1 rebalances failed"),
        ("affinity", log(MOVED), LogSummary((MOVED,), 1, malformed=2), "2 rebalance lines"),
    ],
)
def test_a_claim_that_the_log_does_not_show_voids(arm: str, life: LogSummary, cell: LogSummary, why: str) -> None:
    (reason,) = reasons(arm, life, cell)
    assert why in reason


def test_an_unpatched_server_cannot_prove_moves(unpatched_log: str) -> None:
    seen = parse_log(unpatched_log)
    (reason,) = reasons("vanilla", seen, seen)
    assert "does not say whether experts moved" in reason


def test_an_arm_without_recorder_only_shows_that_it_rebalanced(unpatched_log: str) -> None:
    seen = parse_log(unpatched_log)
    assert reasons("vanilla-unrecorded", seen, seen) == ()
    assert reasons("vanilla-unrecorded", seen, NOTHING) == ("no rebalance during the cell",)


def test_incomplete_requests_void() -> None:
    assert reasons("none", NOTHING, NOTHING, completed=7) == ("7 of 8 requests completed",)


def test_missing_output_tokens_void() -> None:
    assert reasons("none", NOTHING, NOTHING, output_tokens=200) == ("200 of 256 output tokens arrived",)


def test_concurrency_must_be_reached_in_a_closed_loop_only() -> None:
    assert "concurrency 4 not reached" in reasons("none", NOTHING, NOTHING, mean_concurrency=1.0)[0]
    assert reasons("none", NOTHING, NOTHING, mean_concurrency=1.0, open_loop=True) == ()


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"silent_requests": 2}, "2 requests completed without a token that could be timed"),
        ({"whole_requests": 3}, "3 requests decoded in the steady part; a row needs 4"),
        ({"timed_ttfts": 3}, "3 requests began in the steady part and got a token; a row needs 4"),
        ({"client_cores": 0.95}, "load generator was the bottleneck (0.95 of its one core busy)"),
        ({"client_lag_p99_ms": 25.0}, "load generator was late (event loop lag P99 25.0 ms, a chunk every 20.0 ms)"),
        ({"server_in_flight": 2.0}, "the schedulers held 2.0 of 3.8 requests in flight"),
        ({"server_queue": 2.0}, "2 requests waited for room in the server"),
    ],
)
def test_what_makes_times_the_clients_or_the_queues_voids(changed: dict[str, float], why: str) -> None:
    (reason,) = reasons("none", NOTHING, NOTHING, **changed)
    assert why in reason


def test_requests_that_the_flags_hold_back_may_wait() -> None:
    assert reasons("none", NOTHING, NOTHING, server_queue=2.9, held_back=2.0) == ()
    (reason,) = reasons("none", NOTHING, NOTHING, server_queue=3.1, held_back=2.0)
    assert reason.startswith("3 requests waited for room in the server")


def test_what_the_flags_of_a_server_hold_back() -> None:
    table, main = Profile.named("h200-x2-table").server, Profile.named("h200-x2").server
    assert [table.held_back(n) for n in (64, 512, 2048)] == [32, 256, 1536 + 256]
    assert main.held_back(2048) == 0


def test_ttft_that_was_not_seen_voids() -> None:
    assert reasons("none", NOTHING, NOTHING, unseen_first_tokens=0.07) == ()
    (reason,) = reasons("none", NOTHING, NOTHING, unseen_first_tokens=0.4)
    assert "40% of the requests got their first text with several tokens" in reason


def test_a_cpu_server_is_not_held_to_times() -> None:
    slow = {**GOOD, "mean_concurrency": 3.0, "client_lag_p99_ms": 250.0, "server_in_flight": 1.0}
    slow["unseen_first_tokens"] = 0.4
    loop: dict[str, Any] = {"requested": 8, "wanted_tokens": 256, "concurrency": 4, "open_loop": False}
    logs: dict[str, Any] = {"metrics": slow, "server_life": NOTHING, "cell": NOTHING}
    assert void_reasons(ARMS["none"], **loop, **logs, speeds=False) == ()
    assert len(void_reasons(ARMS["none"], **loop, **logs)) == 4


def test_a_log_without_batch_lines_does_not_void() -> None:
    bare = {k: v for k, v in GOOD.items() if not k.startswith(("server", "client"))}
    loop: dict[str, Any] = {"requested": 8, "wanted_tokens": 256, "concurrency": 4, "open_loop": False}
    assert void_reasons(ARMS["none"], **loop, metrics=bare, server_life=NOTHING, cell=NOTHING) == ()


def test_an_error_is_the_one_reason() -> None:
    assert reasons("vanilla", NOTHING, NOTHING, error="server ended", completed=0) == ("server ended",)


def test_wrong_weights_void_every_row_that_follows() -> None:
    line = f"[2026-01-01 00:00:00 TP1 EP1] [eplb-affinity] verify: rank 1 {verify.WRONG} for (layer, expert) [(0, 3)]"
    (reason,) = reasons("async-verified", parse_log(line), NOTHING)
    assert reason == "1 checks of the weights found a slot that does not hold what the map says"
    assert reasons("async-verified", NOTHING, NOTHING) == ()
    assert ARMS["async-verified"].environment == ((verify.ENVIRONMENT, "1"),)
