"""Request logs as a load generator would leave them, made up to order."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from types import SimpleNamespace

from bench.harness.request_log import RequestLog

EPOCH = 1_790_000_000.0


def output(
    start: float, ttft: float, gaps: Sequence[tuple[float, int]], ok: bool = True, prompt: int = 10
) -> SimpleNamespace:
    """One of bench_serving's outputs; ``gaps``: seconds and tokens of each chunk after the first token."""
    itl = [gap / tokens for gap, tokens in gaps for _ in range(tokens)]
    return SimpleNamespace(
        start_time=start,
        ttft=ttft,
        latency=ttft + sum(gap for gap, _ in gaps),
        prompt_len=prompt,
        output_len=1 + len(itl),
        success=ok,
        itl=itl,
    )


def closed_loop(
    concurrency: int, lengths: Sequence[int], itl: float = 0.02, ttft: float = 0.1, cpu: float = 0.3, lag: float = 0.001
) -> RequestLog:
    """As many requests in flight as wanted, each followed at once by the next; every token takes ``itl`` seconds."""
    ends = [0.0] * min(concurrency, len(lengths))
    outputs = []
    for number, length in enumerate(lengths):
        start = heapq.heappop(ends)
        # A little apart, so that no two chunks of a request look like one.
        outputs.append(output(start, ttft, [(itl * (1 + 1e-6 * (i + number)), 1) for i in range(length - 1)]))
        heapq.heappush(ends, start + outputs[-1].latency)
    samples = [(0.01 * i, 0.01 * i * cpu, lag) for i in range(round(100 * max(ends)) + 1)]
    return RequestLog.of_outputs(outputs, 0.0, EPOCH, samples)
