"""What is taken from a row, and that ramp-up and ramp-down are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.figures.steady import (
    Targets,
    Window,
    client_metrics,
    in_flight,
    part_in,
    steady_metrics,
    steady_window,
    timeline,
)
from bench.harness.request_log import RequestLog
from tests.bench.loads import EPOCH, closed_loop, output


def test_chunks_are_found_again_and_survive_the_file(tmp_path: Path) -> None:
    outputs = [output(5.0, 0.5, [(0.4, 4), (0.8, 4), (0.1, 1)]), output(6.0, 0.25, []), output(6.5, 0.5, [(1.0, 2)])]
    log = RequestLog.of_outputs(outputs, 5.0, EPOCH, [(5.5, 0.1, 0.0)])
    assert log.gap_tokens.tolist() == [4, 4, 1, 2] and log.first_gap.tolist() == [0, 3, 3, 4]
    assert log.chunk_times() == pytest.approx([0.9, 1.7, 1.8, 3.0])
    assert log.output_tokens.tolist() == [10, 1, 3] and log.sample_time.tolist() == [0.5]
    log.save(tmp_path / "r.npz")
    again = RequestLog.load(tmp_path / "r.npz")
    assert again.epoch == EPOCH and again.gap.tolist() == log.gap.tolist()
    assert again.chunk_times() == pytest.approx(log.chunk_times())


def test_the_window_holds_the_wanted_concurrency() -> None:
    log = closed_loop(8, [8 * (i + 1) for i in range(8)] + [64] * 40)
    window = steady_window(log, 8, open_loop=False)
    assert window is not None
    assert window.start == pytest.approx(0.1) and window.end == pytest.approx(log.start.max())
    assert in_flight(log, window) == pytest.approx(8.0)
    assert in_flight(log, Window(0.0, float(log.end.max()))) < 7.8  # the tail runs with fewer


def test_rates_and_latencies_are_those_of_the_steady_part() -> None:
    log = closed_loop(8, [8 * (i + 1) for i in range(8)] + [64] * 80)
    window = steady_window(log, 8, open_loop=False)
    assert window is not None
    # The first wave's prefill takes long: it must not show.
    slow = replace(log, ttft=np.where(log.start == 0, 0.05, log.ttft))
    found = steady_metrics(slow, window, Targets(slo_ttft_ms=100.5, slo_tpot_ms=40))
    assert found["p50_ttft_ms"] == found["p99_ttft_ms"] == pytest.approx(100.0)
    assert found["p90_tpot_ms"] == pytest.approx(20.0, rel=1e-3) == found["p95_itl_ms"]
    request_s = 0.1 + 63 * 0.02
    assert found["qps"] == pytest.approx(8 / request_s, rel=0.05)
    assert found["output_tokens_per_s"] == pytest.approx(8 * 64 / request_s, rel=0.05)
    assert found["goodput_qps"] == pytest.approx(found["qps"])
    assert found["stalls"] == found["stall_events"] == found["longest_stall_ms"] == 0
    strict = steady_metrics(log, window, Targets(slo_ttft_ms=99))
    assert strict["goodput_qps"] == 0 and "goodput_qps" not in steady_metrics(log, window, Targets())


def test_requests_that_waited_since_before_the_steady_part_have_a_tpot_in_it_and_no_ttft() -> None:
    """As where three times as many are in flight as run at once: TTFT is longer than the steady part."""
    waits = [(0.0, 0.5), (0.0, 2.0), (1.0, 4.0), (3.2, 0.4), (3.3, 3.0)]
    log = RequestLog.of_outputs([output(start, ttft, [(0.5, 5)]) for start, ttft in waits], 0.0, EPOCH)
    found = steady_metrics(log, Window(3.0, 6.0), Targets())
    assert (found["whole_requests"], found["timed_ttfts"]) == (2, 1)  # of the last one the first token came too late
    assert found["p50_ttft_ms"] == pytest.approx(400) and found["p50_tpot_ms"] == pytest.approx(100)
    assert "p50_ttft_ms" not in steady_metrics(log, Window(4.0, 6.0), Targets())


def test_a_request_counts_with_the_tokens_that_came_in_the_window() -> None:
    # 10 tokens in; first token at 1.0 s, then 2 chunks of 4 and 1 tokens at 2.0 and 3.0 s: 16 tokens in all.
    log = RequestLog.of_outputs([output(0.5, 0.5, [(1.0, 4), (1.0, 1)], prompt=10)], 0.0, EPOCH)
    for (start, end), tokens in (((0, 4), 16), ((0.9, 1.5), 11), ((1.5, 4), 5), ((1.5, 2.5), 4), ((3.5, 4), 0)):
        assert part_in(log, Window(start, end)) == pytest.approx([tokens / 16])
    failed = replace(log, ok=np.array([False]))
    assert part_in(failed, Window(0, 4)) == [0.0]


def test_requests_whose_first_tokens_had_no_text_are_left_out_of_what_it_times() -> None:
    # Every tenth request shows its first text with its last token: half a character, or a special token.
    log = closed_loop(8, [8 * (i + 1) for i in range(8)] + [64] * 80)
    outputs = []
    for i in range(len(log.start)):
        gaps = [(0.02 * (1 + 1e-6 * k), 1) for k in range(int(log.output_tokens[i]) - 1)]
        late = output(float(log.start[i]), float(log.latency[i]), [])
        late.output_len = int(log.output_tokens[i])
        outputs.append(late if i % 10 == 0 else output(float(log.start[i]), float(log.ttft[i]), gaps))
    mixed = RequestLog.of_outputs(outputs, 0.0, EPOCH)
    assert mixed.first_tokens[:11].tolist() == [8, 1, 1, 1, 1, 1, 1, 1, 1, 1, 64]
    window, plain = steady_window(mixed, 8, open_loop=False), steady_window(log, 8, open_loop=False)
    assert window is not None and plain is not None and window.start == pytest.approx(plain.start)
    targets = Targets(slo_ttft_ms=101)
    found, expected = steady_metrics(mixed, window, targets), steady_metrics(log, plain, targets)
    for name in ("p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms", "p50_itl_ms"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3)
    assert found["qps"] == pytest.approx(expected["qps"], rel=0.05)
    assert found["goodput_qps"] == pytest.approx(found["qps"])
    assert expected["unseen_first_tokens"] == 0 and found["unseen_first_tokens"] == pytest.approx(0.1, abs=0.03)


def test_bursts_of_completions_hardly_change_qps() -> None:
    # A prompt is done every 0.1 s, but decoding comes once a second: a window of 1.5 s holds 10 completions or 20.
    firsts = [0.05 + 0.1 * i for i in range(80)]
    outputs = [output(first - 0.02, 0.02, [(int(first) + 2 - first, 5)], prompt=500) for first in firsts]
    log = RequestLog.of_outputs(outputs, 0.0, EPOCH)
    windows = [Window(begin, begin + 1.5) for begin in (3.1, 3.4, 3.7, 4.1)]
    assert {int((log.ok & window.holds(log.end)).sum()) for window in windows} == {10, 20}
    found = [steady_metrics(log, window, Targets())["qps"] for window in windows]
    assert found == pytest.approx([10.0] * 4, rel=0.02)


def test_a_stall_of_the_server_is_one_event_for_all_requests_in_chunked_streams_too() -> None:
    # 4 tokens a chunk, 10 ms each; one chunk of each of 3 requests comes 150 ms late.
    def stream(start: float, late: int) -> list[tuple[float, int]]:
        return [(0.04 + 1e-6 * i + (0.15 if i == late else 0.0), 4) for i in range(30)]

    outputs = [output(0.001 * i, 0.1, stream(0.001 * i, 9)) for i in range(3)]
    outputs.append(output(0.0, 0.1, stream(0.0, -1)))
    log = RequestLog.of_outputs(outputs, 0.0, EPOCH)
    found = steady_metrics(log, Window(0.0, 10.0), Targets())
    assert (found["stalls"], found["stall_events"]) == (3, 1)
    assert found["longest_stall_ms"] == pytest.approx(150, rel=0.01)
    assert found["max_itl_ms"] == pytest.approx(47.5, rel=0.01) and found["p95_itl_ms"] < 12
    assert steady_metrics(log, Window(0.0, 10.0), Targets(stall_ms=200))["stalls"] == 0


def test_an_open_loop_is_steady_from_the_first_completion_to_the_last_arrival() -> None:
    outputs = [output(0.1 * i, 0.05, [(0.1, 1), (0.2, 1)]) for i in range(20)]
    window = steady_window(RequestLog.of_outputs(outputs, 0.0, EPOCH), 64, open_loop=True)
    assert window is not None and (window.start, window.end) == pytest.approx((0.35, 1.9))


def test_a_row_that_never_gets_steady_has_no_window() -> None:
    assert steady_window(closed_loop(8, [8] * 8), 8, open_loop=False) is None
    failed = RequestLog.of_outputs([output(0.0, 0.0, [], ok=False)], 0.0, EPOCH)
    assert steady_window(failed, 1, open_loop=False) is None


def test_the_load_generator_is_watched() -> None:
    found = client_metrics(closed_loop(2, [8] * 20, cpu=0.7, lag=0.004), Window(0.5, 2.0))
    assert found["client_cores"] == pytest.approx(0.7) and found["client_lag_p99_ms"] == pytest.approx(4.0)
    assert client_metrics(closed_loop(2, [8] * 20), Window(90.0, 91.0)) == {}


def test_timeline_bins() -> None:
    log = RequestLog.of_outputs([output(0.0, 0.05, [(0.1, 1), (0.1001, 1), (0.3, 2)])], 0.0, EPOCH)
    bins = timeline(log, bin_s=0.1)
    assert bins["tokens"].tolist() == [0, 1, 1, 0, 0, 2]
    assert bins["max_itl_ms"][1] == pytest.approx(100) and bins["p50_itl_ms"][5] == pytest.approx(150)
    assert np.isnan(bins["p50_itl_ms"][0])
    assert bins["in_flight"].tolist() == [1.0] * len(bins["time"])
