"""When a row does not count, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping

from bench.figures.rebalance_log import FAILED, LogSummary
from bench.harness.arms import Arm
from bench.harness.profile import DECODE, PREFILL, REQUESTS

# Below this part of the wanted concurrency, on average over the steady part, a closed loop did not reach it.
REACHED_CONCURRENCY = 0.9
# Where speeds mean nothing anyway: a CPU server leaves the load generator no core of its own.
REACHED_CONCURRENCY_ON_CPU = 0.7
MIN_WHOLE_REQUESTS = 4  # that decoded, and that began, inside the steady part: fewer have no percentiles
# Above this part, requests whose first tokens had no text (and so no time) may differ from those that TTFT is of.
UNSEEN_FIRST_TOKENS = 0.2
# A load generator that uses more of its one core cannot take tokens as fast as they come.
BUSY_CLIENT_CORES = 0.9
# Requests that the client has in flight but no scheduler runs or queues are stuck before or behind the schedulers.
HELD_BY_SCHEDULERS = 0.8
# Requests that wait while others decode, beyond those that the server's flags hold back: more than these found no room
# and hide in TTFT. New ones always wait a step.
ADMISSION_QUEUE = 0.1


def void_reasons(
    arm: Arm,
    *,
    requested: int,
    wanted_tokens: int,
    concurrency: int,
    open_loop: bool,
    metrics: Mapping[str, float],
    server_life: LogSummary,
    cell: LogSummary,
    error: str | None = None,
    speeds: bool = True,
    kind: str = REQUESTS,
    one_map: bool = False,
    held_back: float = 0.0,
) -> tuple[str, ...]:
    """Everything that voids a cell; empty for a row that counts. ``speeds``: whether its times mean anything (on a CPU
    they do not, and are not checked). ``one_map``: the arm serves one map, so it must not rebalance. ``held_back``:
    requests that the server's flags keep waiting (ServerConfig.held_back)."""
    if error:  # what is missing besides follows from it
        return (error,)
    reasons = []
    completed = int(metrics.get("completed", 0))
    if completed != requested:
        reasons.append(f"{completed} of {requested} requests completed")
    elif (got := int(metrics.get("output_tokens", 0))) < 0.98 * wanted_tokens:
        reasons.append(f"{got} of {wanted_tokens} output tokens arrived")
    elif silent := int(metrics.get("silent_requests", 0)):
        reasons.append(f"{silent} requests completed without a token that could be timed")
    elif kind == PREFILL:
        reasons += [] if "full_prefill_ms" in metrics or not speeds else ["too few full prefill passes; send more"]
    elif kind == DECODE:
        reasons += _decode_reasons(metrics, speeds)
    elif (whole := int(metrics.get("whole_requests", 0))) < MIN_WHOLE_REQUESTS:
        reasons.append(f"{whole} requests decoded in the steady part; a row needs {MIN_WHOLE_REQUESTS}: send more")
    elif (timed := int(metrics.get("timed_ttfts", MIN_WHOLE_REQUESTS))) < MIN_WHOLE_REQUESTS:
        reasons.append(f"{timed} requests began in the steady part and got a token; a row needs {MIN_WHOLE_REQUESTS}")
    else:
        reasons += _load_reasons(concurrency, open_loop, metrics, speeds, held_back)
    return tuple(reasons + _rebalance_reasons(arm, server_life, cell, one_map))


def _decode_reasons(metrics: Mapping[str, float], speeds: bool) -> list[str]:
    if "p90_tpot_ms" not in metrics:
        return ["no time in which all requests decoded; ask for more output tokens"]
    if not speeds:
        return []
    found = _client_reasons(metrics)
    if (held := metrics.get("server_in_flight")) is not None and held < HELD_BY_SCHEDULERS * metrics["completed"]:
        found.append(f"the schedulers held {held:.1f} of {metrics['completed']:.0f} requests while all decoded")
    return found


def _client_reasons(metrics: Mapping[str, float]) -> list[str]:
    if (cores := metrics.get("client_cores", 0.0)) > BUSY_CLIENT_CORES:
        return [f"the load generator was the bottleneck ({cores:.2f} of its one core busy)"]
    if (lag := metrics.get("client_lag_p99_ms", 0.0)) > metrics.get("p50_chunk_gap_ms", math.inf):
        gap = metrics["p50_chunk_gap_ms"]
        return [f"the load generator was late (event loop lag P99 {lag:.1f} ms, a chunk every {gap:.1f} ms)"]
    return []


def _load_reasons(
    concurrency: int, open_loop: bool, metrics: Mapping[str, float], speeds: bool, held_back: float
) -> list[str]:
    reasons = []
    in_flight = metrics["mean_concurrency"]
    least = REACHED_CONCURRENCY if speeds else REACHED_CONCURRENCY_ON_CPU
    if not open_loop and in_flight < least * concurrency:
        reasons.append(f"concurrency {concurrency} not reached (mean in flight {in_flight:.1f})")
    if not speeds:
        return reasons
    if (unseen := metrics.get("unseen_first_tokens", 0.0)) > UNSEEN_FIRST_TOKENS:
        reasons.append(f"{unseen:.0%} of the requests got their first text with several tokens: TTFT was not seen")
    reasons += _client_reasons(metrics)
    held = metrics.get("server_in_flight")
    if held is not None and in_flight >= 2 and held < HELD_BY_SCHEDULERS * in_flight:
        reasons.append(f"the schedulers held {held:.1f} of {in_flight:.1f} requests in flight: tokens wait elsewhere")
    if (queue := metrics.get("server_queue", 0.0)) > held_back + max(1.0, ADMISSION_QUEUE * in_flight):
        reasons.append(f"{queue:.0f} requests waited for room in the server, which hides in TTFT")
    return reasons


def _rebalance_reasons(arm: Arm, server_life: LogSummary, cell: LogSummary, one_map: bool) -> list[str]:
    if wrong := server_life.wrong_weights:
        return [f"{wrong} checks of the weights found a slot that does not hold what the map says"]
    if not arm.may_rebalance or one_map:
        seen = max(len(server_life.rebalances), server_life.upstream_ends)
        of = "that rebalances nothing" if arm.uses_eplb else "without EPLB"
        return [f"{seen} rebalances in the log of an arm {of}"] if seen else []
    if not arm.recorded:
        return [] if cell.upstream_ends else ["no rebalance during the cell"]
    if cell.malformed:
        return [f"{cell.malformed} rebalance lines of the server log could not be read"]
    if failed := cell.with_result(FAILED):
        return [f"{failed} rebalances failed"]
    if not arm.expects_rebalances:
        return []
    if not cell.rebalances:
        if cell.upstream_ends:
            return [f"{cell.upstream_ends} rebalances, but the log does not say whether experts moved (not patched?)"]
        return ["no rebalance during the cell"]
    if not server_life.moved:
        return ["no rebalance moved an expert"]
    return []
