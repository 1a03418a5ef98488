"""The figures of one cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bench.figures.rebalance_log import FAILED, UNCHANGED, LogSummary, mean_of
from bench.figures.server_log import batch_lines, decode_steps, full_prefills, queue_metrics
from bench.figures.steady import (
    Targets,
    client_metrics,
    decode_metrics,
    decode_window,
    in_flight,
    steady_metrics,
    steady_window,
)
from bench.harness.profile import DECODE, PREFILL, LoadConfig
from bench.harness.request_log import RequestLog

PLACEMENT = ("balancedness", "gpu_fanout", "node_fanout", "remote_gpu_copies", "remote_node_copies")


def latency_metrics(log: RequestLog, load: LoadConfig, concurrency: int, server_log: str = "") -> dict[str, float]:
    """What the requests say, and the server's log of the row about them; latencies in ms, rates in 1/s.

    All but ``completed``, ``duration_s``, the token totals, full prefill passes and decode steps is of the row's steady
    part; that of a `decode` load is when all its requests decode, and a `prefill` load has none.
    """
    ends = log.end[log.ok]
    found = {
        "completed": float(log.ok.sum()),
        "input_tokens": float(log.input_tokens[log.ok].sum()),
        "output_tokens": float(log.output_tokens.sum()),
        "duration_s": float(ends.max() - log.start.min()) if len(ends) else 0.0,
        "silent_requests": float((log.ok & (log.ttft == 0)).sum()),
    }
    lines = batch_lines(server_log)
    targets = Targets(load.slo_ttft_ms, load.slo_tpot_ms, load.stall_ms)
    if load.kind == PREFILL:
        seconds = max(found["duration_s"], 1e-9)
        return found | full_prefills(lines) | {"input_tokens_per_s": found["input_tokens"] / seconds}
    if load.kind == DECODE:
        window = decode_window(log)
        if window is None:
            return found
        measured = decode_metrics(log.first(load.token_streams) if load.token_streams else log, window, targets)
        if load.token_streams:  # the rate of a few of them
            measured.pop("output_tokens_per_s", None)
            measured["mean_concurrency"] = in_flight(log, window)
        found |= measured | client_metrics(log, window) | decode_steps(server_log)
        return found | queue_metrics(lines, log.epoch + window.start, log.epoch + window.end)
    window = steady_window(log, concurrency, bool(load.request_rate))
    if window is None:
        return found
    found |= steady_metrics(log, window, targets) | client_metrics(log, window)
    found |= queue_metrics(lines, log.epoch + window.start, log.epoch + window.end)
    return found | full_prefills(lines)


def _p99(values: Sequence[float]) -> float | None:
    return float(np.percentile(values, 99)) if values else None


def placement_metrics(
    server_life: LogSummary, cell: LogSummary, probed: Mapping[str, float] | None = None
) -> dict[str, float | int | None]:
    """Balancedness, fan-outs and remote copies as the server saw them, each three times.

    ``*_initial``: the placement the server started with, on its first window. ``*_served``: the placement in use
    during the cell, on the traffic of the cell (mean over its rebalances after the first that moved experts).
    ``*_planned``: what the new maps promised on the windows they were planned on. ``probed``: the initial placement
    of a server that never rebalances, measured on the warm-up prompts. ``commit_ms_p99``: how long asynchronous rounds
    stopped the server for a layer, over those of the cell that moved experts.
    """
    out: dict[str, float | int | None] = {
        "rebalances": len(cell.rebalances) or cell.upstream_ends,
        "rebalances_moved": cell.moved if cell.rebalances or not cell.upstream_ends else None,
        "rebalances_unchanged": cell.with_result(UNCHANGED),
        "rebalances_failed": cell.with_result(FAILED),
        "moved_experts": sum(r.moved_experts for r in cell.rebalances if r.moved),
        "plan_seconds": mean_of(cell.rebalances, "plan_seconds"),
        "rebalance_seconds": mean_of(cell.rebalances, "seconds"),
        "commit_ms_p99": _p99([ms for r in cell.rebalances if r.moved for ms in r.commit_ms]),
    }
    life = server_life.rebalances
    before_cell = len(life) - len(cell.rebalances)
    first_move = next((i for i, r in enumerate(life) if r.moved), len(life))
    served = life[max(before_cell, first_move + 1) :]
    for name in PLACEMENT:
        out[f"{name}_initial"] = mean_of(life[:1], f"{name}_before") if life else (probed or {}).get(name)
        out[f"{name}_served"] = mean_of(served, f"{name}_before")
        out[f"{name}_planned"] = mean_of(cell.rebalances, f"{name}_after")
    return out
