"""When a row does not count, and why."""

from __future__ import annotations

from collections.abc import Mapping

from bench.arms import Arm
from bench.rebalance_log import FAILED, LogSummary

# A closed loop whose mean number of requests in flight is below this part of the wanted concurrency never
# reached it (the first and the last requests of a cell always run with fewer).
REACHED_CONCURRENCY = 0.7


def void_reasons(
    arm: Arm,
    *,
    requested: int,
    output_tokens: int,
    concurrency: int,
    open_loop: bool,
    metrics: Mapping[str, float],
    server_life: LogSummary,
    cell: LogSummary,
    error: str | None = None,
) -> tuple[str, ...]:
    """Everything that voids a cell; empty for a row that counts."""
    if error:  # what is missing besides follows from it
        return (error,)
    reasons = []
    completed = int(metrics.get("completed", 0))
    if completed != requested:
        reasons.append(f"{completed} of {requested} requests completed")
    else:
        wanted = requested * output_tokens
        if (got := int(metrics.get("output_tokens", 0))) < 0.98 * wanted:
            reasons.append(f"{got} of {wanted} output tokens arrived")
        in_flight = metrics.get("mean_concurrency", 0.0)
        if not open_loop and in_flight < REACHED_CONCURRENCY * concurrency:
            reasons.append(f"concurrency {concurrency} not reached (mean in flight {in_flight:.1f})")
    return tuple(reasons + _rebalance_reasons(arm, server_life, cell))


def _rebalance_reasons(arm: Arm, server_life: LogSummary, cell: LogSummary) -> list[str]:
    if not arm.expects_rebalances:
        seen = max(len(server_life.rebalances), server_life.upstream_ends)
        return [f"{seen} rebalances in the log of an arm without EPLB"] if seen else []
    if cell.malformed:
        return [f"{cell.malformed} rebalance lines of the server log could not be read"]
    if failed := cell.with_result(FAILED):
        return [f"{failed} rebalances failed"]
    if not cell.rebalances:
        if cell.upstream_ends:
            return [f"{cell.upstream_ends} rebalances, but the log does not say whether experts moved (not patched?)"]
        return ["no rebalance during the cell"]
    if not server_life.moved:
        return ["no rebalance moved an expert"]
    return []
