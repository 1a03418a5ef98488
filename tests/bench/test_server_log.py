"""Requests that run and wait, from lines as a patched SGLang 0.5.17 logs them."""

from __future__ import annotations

import pytest

from bench.figures.server_log import (
    BatchLine,
    batch_lines,
    full_prefills,
    lines_between,
    queue_metrics,
    unix_time,
)

LOG = """\
[2026-11-21 22:30:24.100 DP0 TP0 EP0] Prefill batch, #new-seq: 3, #new-token: 90, #cached-token: 0, token usage: 0.05, \
#running-req: 16, #queue-req: 9, #pending-token: 0, cpu graph: False, input throughput (token/s): 119.75
[2026-11-21 22:30:24.500 DP0 TP0 EP0] Decode batch, #running-req: 16, #token: 1788, token usage: 0.05, \
cpu graph: False, gen throughput (token/s): 119.75, #queue-req: 2
[2026-11-21 22:30:24.600 DP1 TP1 EP1] Decode batch, #running-req: 12, #token: 1788, token usage: 0.05, \
cuda graph: True, gen throughput (token/s): 119.75, #queue-req: 0
[2026-11-21 22:30:25.000 DP0 TP0 EP0] Decode batch, #running-req: 14, #token: 1788, token usage: 0.05, \
cpu graph: False, gen throughput (token/s): 119.75, #queue-req: 0
[2026-11-21 22:31:24 DP0 TP0 EP0] Decode batch, #running-req: 1, #token: 1, token usage: 0.05, \
cpu graph: False, gen throughput (token/s): 1.75, #queue-req: 50
[2026-11-21 22:31:25 TP0] something else
"""


def test_running_and_waiting_requests_of_the_window_are_summed_over_schedulers() -> None:
    lines = batch_lines(LOG)
    assert [line.decode for line in lines] == [False, True, True, True, True]
    start = unix_time("2026-11-21 22:30:24")
    found = queue_metrics(lines, start, start + 2)
    assert found == {"server_in_flight": pytest.approx((18 + 14) / 2 + 12), "server_queue": 1.0}
    assert queue_metrics(lines, start + 2, start + 3) == {}


def test_a_part_of_a_log_has_whole_entries() -> None:
    start = unix_time("2026-11-21 22:30:24.500")
    text = LOG.replace("[2026-11-21 22:30:25.000", "Traceback\n[2026-11-21 22:30:25.000")
    part = lines_between(text, start, start + 0.2).splitlines()
    assert len(part) == 3 and " DP0 " in part[0] and " DP1 " in part[1] and part[2] == "Traceback"
    assert lines_between(text, 0.0, start - 1) == ""


def test_full_prefills_are_timed_from_one_to_the_next_of_the_same_scheduler() -> None:
    def line(time: float, tokens: int, rank: str = "DP0", decode: bool = False) -> BatchLine:
        return BatchLine(time, rank, decode, 0, 0, tokens)

    # Passes of 70 ms, of two schedulers at the same time; then one that followed decoding, and one that is not full.
    lines = [line(0.07 * number, 8192, rank) for number in range(16) for rank in ("DP0", "DP1")]
    lines += [line(1.5, 0, decode=True), line(9.0, 8192), line(9.01, 100), line(9.02, 8192)]
    assert full_prefills(lines) == {"full_prefill_ms": 70.0, "full_prefill_tokens": 8192.0, "full_prefills": 30.0}
    assert full_prefills(lines[:20]) == {} and full_prefills([]) == {}
    assert [line.new_tokens for line in batch_lines(LOG)] == [90, 0, 0, 0, 0]
