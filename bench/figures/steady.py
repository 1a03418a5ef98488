"""The steady part of a row, and the metrics of that part alone.

While a closed loop fills up, the first requests queue for their prefill; while it drains, the last ones run in smaller
batches. Neither says anything about the concurrency that the row is named after, so both are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.harness.request_log import RequestLog


@dataclass(frozen=True)
class Targets:
    """The stated service-level objective (0: none) and what counts as a stall.

    A request is good if its TTFT and its TPOT are within the objective. A chunk of n tokens stalled if it came more
    than ``stall_ms`` and more than 4 median ITLs later than n median ITLs after the chunk before (for streams of
    single tokens: an ITL of more than 5 times the median).
    """

    slo_ttft_ms: float = 0.0
    slo_tpot_ms: float = 0.0
    stall_ms: float = 50.0


@dataclass(frozen=True)
class Window:
    """From ``start`` to ``end``, seconds on the request log's clock."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def holds(self, times: np.ndarray) -> np.ndarray:
        return np.asarray((times >= self.start) & (times <= self.end))


def steady_window(log: RequestLog, concurrency: int, open_loop: bool) -> Window | None:
    """The time in which the wanted load holds; None if there is no such time.

    Closed loop: from when each of the first ``concurrency`` requests has its first token (of those whose first token
    could be seen), to the start of the last request (from then on fewer are in flight). Open loop: from the first
    completion to the last arrival.
    """
    if not log.ok.any():
        return None
    order = np.argsort(log.start, kind="stable")
    if open_loop:
        begin = float(log.end[log.ok].min())
    else:
        first = order[: min(concurrency, len(order))]
        seen = first[first_token_seen(log)[first]]
        begin = float((log.start + log.ttft)[seen if len(seen) else first].max())
    window = Window(begin, float(log.start[order[-1]]))
    return window if window.seconds > 0 else None


def decode_window(log: RequestLog) -> Window | None:
    """The time in which all requests of a wave decode: from the last first token to the first completion."""
    if not log.ok.all() or not len(log.ok):
        return None
    window = Window(float((log.start + log.ttft).max()), float(log.end.min()))
    return window if window.seconds > 0 else None


def decode_metrics(log: RequestLog, window: Window, targets: Targets) -> dict[str, float]:
    """Of a wave's common decoding: ITL of every token that came in ``window``, TPOT of each request's tokens in it
    (without the first chunk, part of which is of the time before), tokens/s of all."""
    request = np.repeat(np.arange(len(log.start)), np.diff(log.first_gap))
    times = log.chunk_times()
    came = window.holds(times) & window.holds(times - log.gap)
    seconds = np.bincount(request[came], log.gap[came], len(log.start))
    tokens = np.bincount(request[came], log.gap_tokens[came], len(log.start))
    out = {"steady_s": window.seconds, "mean_concurrency": in_flight(log, window)}
    if not (tokens > 0).all():
        return out
    out |= _percentiles("tpot_ms", 1e3 * seconds / tokens, (50, 90, 99))
    out |= _itl(log.gap[came].astype(np.float64), log.gap_tokens[came].astype(np.int64), times[came], targets)
    out["output_tokens_per_s"] = float(log.gap_tokens[window.holds(times)].sum() / window.seconds)
    return {name: float(value) for name, value in out.items()}


def first_token_seen(log: RequestLog) -> np.ndarray:
    """bool [n]: whether TTFT is the time of the first token, and not of a later one that first had text."""
    return np.asarray(log.ok & (log.first_tokens <= 1))


def in_flight(log: RequestLog, window: Window) -> float:
    """Mean number of requests in flight during the window."""
    overlap = np.minimum(log.end, window.end) - np.maximum(log.start, window.start)
    return float(np.clip(overlap, 0, None).sum() / window.seconds)


def part_in(log: RequestLog, window: Window) -> np.ndarray:
    """float64 [n], 0 to 1: of each request's tokens, prompt and output, the part that came in the window."""
    request = np.repeat(np.arange(len(log.start)), np.diff(log.first_gap))
    came = np.bincount(request, log.gap_tokens * window.holds(log.chunk_times()), len(log.start))
    came += (log.input_tokens + log.first_tokens) * window.holds(log.start + log.ttft)
    return np.asarray(log.ok * came / np.maximum(log.input_tokens + log.output_tokens, 1))


def steady_metrics(log: RequestLog, window: Window, targets: Targets) -> dict[str, float]:
    """Latencies in ms and rates within the window; a metric without any sample is left out.

    TTFT: of requests that started in the window and got their first token in it (``timed_ttfts`` of them). TPOT: of
    requests whose tokens, from first to last, all came in it (``whole_requests``): how long they waited before is no
    part of it, and where more are in flight than run at once they wait longer than the window. Both leave out requests
    whose first tokens had no text (``unseen_first_tokens``: their part of ``whole_requests``), and goodput takes them
    to be like the others. ITL: of every token that came in the window. Output tokens/s: of those. QPS and goodput: a
    request counts with the part of its tokens that came in the window, those of its prompt with its first token. (Whole
    completions would do in a long window; in one of a few seconds it matters whether one more batch of them falls
    inside.)
    """
    out = {"steady_s": window.seconds, "mean_concurrency": in_flight(log, window)}
    seen = first_token_seen(log)
    first_token = log.start + log.ttft
    began = log.ok & (log.start >= window.start) & (first_token <= window.end)
    began = began & seen if (began & seen).any() else began
    whole = log.ok & (first_token >= window.start) & (log.end <= window.end) & (log.output_tokens > 1)
    timed = whole & seen if (whole & seen).any() else whole
    tpot = (log.latency - log.ttft) / np.maximum(log.output_tokens - 1, 1)
    out["timed_ttfts"], out["whole_requests"] = float(began.sum()), float(whole.sum())
    out["unseen_first_tokens"] = float((whole & ~seen).sum() / max(whole.sum(), 1))
    out |= _percentiles("ttft_ms", 1e3 * log.ttft[began], (50, 90, 99))
    out |= _percentiles("tpot_ms", 1e3 * tpot[timed], (50, 90, 99))
    times = log.chunk_times()
    came = window.holds(times)
    tokens = log.gap_tokens[came].astype(np.int64)
    if tokens.sum():
        out |= _itl(log.gap[came].astype(np.float64), tokens, times[came], targets)
    share = part_in(log, window)
    out["qps"] = share.sum() / window.seconds
    first_tokens = (log.ok & window.holds(first_token)).sum()
    out["output_tokens_per_s"] = (tokens.sum() + first_tokens) / window.seconds
    if targets.slo_ttft_ms or targets.slo_tpot_ms:
        good = seen.copy()
        if targets.slo_ttft_ms:
            good &= 1e3 * log.ttft <= targets.slo_ttft_ms
        if targets.slo_tpot_ms:
            good &= 1e3 * tpot <= targets.slo_tpot_ms
        out["goodput_qps"] = out["qps"] * share[good].sum() / max(share[seen].sum(), 1e-9)
    return {name: float(value) for name, value in out.items()}


def _itl(gap: np.ndarray, tokens: np.ndarray, times: np.ndarray, targets: Targets) -> dict[str, float]:
    """Each token's ITL is its chunk's gap over the chunk's tokens, as bench_serving has it."""
    itl = gap / tokens
    per_token = np.repeat(itl, tokens)
    median = float(np.median(per_token))
    out = {f"p{p}_itl_ms": 1e3 * float(np.percentile(per_token, p)) for p in (50, 95, 99)}
    late = gap - tokens * median
    stalled = late > max(targets.stall_ms / 1e3, 4 * median)
    ends = np.sort(times[stalled])
    return {
        **out,
        "max_itl_ms": 1e3 * float(itl.max()),
        "p50_chunk_gap_ms": 1e3 * float(np.median(gap)),
        "stalls": float(stalled.sum()),
        # Requests that stall together show one stall of the server.
        "stall_events": float(len(ends) and 1 + (np.diff(ends) > targets.stall_ms / 1e3).sum()),
        "longest_stall_ms": 1e3 * float(late[stalled].max(initial=0.0)),
    }


def _percentiles(name: str, values: np.ndarray, wanted: tuple[int, ...]) -> dict[str, float]:
    return {f"p{p}_{name}": float(np.percentile(values, p)) for p in wanted} if len(values) else {}


def client_metrics(log: RequestLog, window: Window) -> dict[str, float]:
    """How busy the load generator was in the window: cores used, and its event loop's lag at P99 in ms."""
    within = window.holds(log.sample_time)
    if within.sum() < 2:
        return {}
    time, cpu = log.sample_time[within], log.sample_cpu[within]
    return {
        "client_cores": float((cpu[-1] - cpu[0]) / (time[-1] - time[0])),
        "client_lag_p99_ms": 1e3 * float(np.percentile(log.sample_lag[within], 99)),
    }


def timeline(log: RequestLog, bin_s: float = 0.1) -> dict[str, np.ndarray]:
    """ITL over the row in bins of ``bin_s``: ``time`` (s, middle of a bin), ``tokens``, ``p50_itl_ms`` and
    ``max_itl_ms`` (NaN where no token came), ``in_flight``; all float64 [bins]."""
    times = log.chunk_times()
    end = float(log.end.max(initial=0.0))
    edges = np.arange(0.0, end + bin_s, bin_s)
    count = max(len(edges) - 1, 1)
    index = np.clip((times / bin_s).astype(int), 0, count - 1)
    itl = 1e3 * log.gap / np.maximum(log.gap_tokens, 1)
    middle = np.full(count, np.nan)
    largest = np.full(count, np.nan)
    order = np.argsort(index, kind="stable")
    starts = np.searchsorted(index[order], np.arange(count + 1))
    for i in range(count):
        own = itl[order[starts[i] : starts[i + 1]]]
        if len(own):
            middle[i], largest[i] = np.median(own), own.max()
    centre = (np.arange(count) + 0.5) * bin_s
    flying = np.searchsorted(np.sort(log.start), centre, "right") - np.searchsorted(np.sort(log.end), centre, "right")
    return {
        "time": centre,
        "tokens": np.bincount(index, weights=log.gap_tokens, minlength=count).astype(np.float64),
        "p50_itl_ms": middle,
        "max_itl_ms": largest,
        "in_flight": flying.astype(np.float64),
    }
