from typing import Any

import pytest

from bench.arms import ARMS
from bench.rebalance_log import LogSummary, Rebalance, parse_log
from bench.validity import void_reasons

GOOD = {"completed": 8, "output_tokens": 256, "mean_concurrency": 3.8}
NOTHING = LogSummary((), 0)
MOVED = Rebalance("applied", moved_experts=3)
UNCHANGED = Rebalance("unchanged")


def reasons(arm: str, life: LogSummary, cell: LogSummary, error: str | None = None, **changed: Any) -> tuple[str, ...]:
    loop = {"requested": 8, "output_tokens": 32, "concurrency": 4, "open_loop": changed.pop("open_loop", False)}
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


def test_incomplete_requests_void() -> None:
    assert reasons("none", NOTHING, NOTHING, completed=7) == ("7 of 8 requests completed",)


def test_missing_output_tokens_void() -> None:
    assert reasons("none", NOTHING, NOTHING, output_tokens=200) == ("200 of 256 output tokens arrived",)


def test_concurrency_must_be_reached_in_a_closed_loop_only() -> None:
    assert "concurrency 4 not reached" in reasons("none", NOTHING, NOTHING, mean_concurrency=1.0)[0]
    assert reasons("none", NOTHING, NOTHING, mean_concurrency=1.0, open_loop=True) == ()


def test_an_error_is_the_one_reason() -> None:
    assert reasons("vanilla", NOTHING, NOTHING, error="server ended", completed=0) == ("server ended",)
