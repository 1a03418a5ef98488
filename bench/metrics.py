"""The figures of one cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.rebalance_log import FAILED, UNCHANGED, LogSummary, mean_of

# Tidy column -> field of bench_serving's result.
_FROM_BENCH = {
    "completed": "completed",
    "duration_s": "duration",
    "input_tokens": "total_input_tokens",
    "output_tokens": "total_output_tokens",
    "qps": "request_throughput",
    "output_tokens_per_s": "output_throughput",
    "mean_concurrency": "concurrency",
    "p50_ttft_ms": "median_ttft_ms",
    "p90_ttft_ms": "p90_ttft_ms",
    "p99_ttft_ms": "p99_ttft_ms",
    "p50_tpot_ms": "median_tpot_ms",
    "p90_tpot_ms": "p90_tpot_ms",
    "p99_tpot_ms": "p99_tpot_ms",
    "p95_itl_ms": "p95_itl_ms",
    "p99_itl_ms": "p99_itl_ms",
}
PLACEMENT = ("balancedness", "gpu_fanout", "node_fanout")


def latency_metrics(bench: Mapping[str, Any], requests: Mapping[str, list[Any]]) -> dict[str, float]:
    """TTFT, TPOT, ITL in ms and rates from bench_serving; the largest ITL from its requests: stalls hide under P95."""
    found = {name: float(bench[field]) for name, field in _FROM_BENCH.items() if bench.get(field) is not None}
    gaps = [gap for request in requests.get("itls", []) for gap in request]
    if gaps:
        found["max_itl_ms"] = 1000.0 * max(gaps)
    return found


def placement_metrics(
    server_life: LogSummary, cell: LogSummary, probed: Mapping[str, float] | None = None
) -> dict[str, float | int | None]:
    """Balancedness and fan-outs as the server saw them, each three times.

    ``*_initial``: the placement the server started with, on its first window. ``*_served``: the placement in use
    during the cell, on the traffic of the cell (mean over its rebalances after the first that moved experts).
    ``*_planned``: what the new maps promised on the windows they were planned on. ``probed``: the initial placement
    of a server that never rebalances, measured on the warm-up prompts.
    """
    out: dict[str, float | int | None] = {
        "rebalances": len(cell.rebalances) or cell.upstream_ends,
        "rebalances_moved": cell.moved,
        "rebalances_unchanged": cell.with_result(UNCHANGED),
        "rebalances_failed": cell.with_result(FAILED),
        "moved_experts": sum(r.moved_experts for r in cell.rebalances if r.moved),
        "plan_seconds": mean_of(cell.rebalances, "plan_seconds"),
        "rebalance_seconds": mean_of(cell.rebalances, "seconds"),
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
