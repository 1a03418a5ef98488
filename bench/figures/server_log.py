"""What a server log says about load: how many requests were running, and how many waited for room."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean, median

_BATCH = re.compile(
    r"^\[(?P<time>[\d-]+ [\d:.]+)(?P<rank>[^\]]*)\] (?P<phase>Prefill|Decode) batch.*?#running-req: (?P<running>\d+)"
    r".*?#queue-req: (?P<queue>\d+)"
)
_RATE = re.compile(r"(?:input|gen) throughput \(token/s\): (?P<rate>[\d.]+)")
_NEW_TOKENS = re.compile(r"#new-token: (?P<tokens>\d+)")
_FEWEST_PREFILLS = 20
LOG_TIME = re.compile(r"^\[(?P<time>\d{4}-[\d-]+ [\d:.]+)")


@dataclass(frozen=True)
class BatchLine:
    """One batch as a scheduler logged it: Unix time, its rank, whether it decoded, requests running and waiting, and
    the tokens that it prefilled."""

    time: float
    rank: str
    decode: bool
    running: int
    queue: int
    new_tokens: int = 0


def batch_lines(text: str) -> list[BatchLine]:
    found = []
    for line in text.splitlines():
        if match := _BATCH.match(line):
            tokens = _NEW_TOKENS.search(line)
            found.append(
                BatchLine(
                    unix_time(match["time"]),
                    match["rank"].strip(),
                    match["phase"] == "Decode",
                    int(match["running"]),
                    int(match["queue"]),
                    int(tokens["tokens"]) if tokens else 0,
                )
            )
    return found


def lines_between(text: str, start: float, end: float) -> str:
    """The lines that were logged between two Unix times; one without a time belongs to the line before it."""
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        if match := LOG_TIME.match(line):
            inside = start <= unix_time(match["time"]) <= end
        if inside:
            kept.append(line)
    return "".join(kept)


def unix_time(stamp: str) -> float:
    """Of a log line's local time, with or without milliseconds."""
    return datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S.%f" if "." in stamp else "%Y-%m-%d %H:%M:%S").timestamp()


def queue_metrics(lines: Sequence[BatchLine], start: float, end: float) -> dict[str, float]:
    """Decode batches between two Unix times: ``server_in_flight``, requests running or waiting, and
    ``server_queue``, waiting only, each the mean (the median) over a scheduler's lines, summed over schedulers.

    Prefill goes first, so requests that wait while others decode found no room. Empty without such lines.
    """
    by_rank: dict[str, list[BatchLine]] = defaultdict(list)
    for line in lines:
        if line.decode and start <= line.time <= end:
            by_rank[line.rank].append(line)
    if not by_rank:
        return {}
    return {
        "server_in_flight": sum(fmean(line.running + line.queue for line in own) for own in by_rank.values()),
        "server_queue": sum(median(line.queue for line in own) for own in by_rank.values()),
    }


def full_prefills(lines: Sequence[BatchLine]) -> dict[str, float]:
    """How long a full prefill pass takes: ``full_prefill_ms``, the median, ``full_prefill_tokens`` of a rank in one,
    and ``full_prefills``, how many were timed. Empty with fewer than 20.

    Full are those with the most tokens. One is timed from a scheduler's line to its next where both are of full
    prefills, so that it neither waits for work nor follows decoding. Such passes wait for the GPUs and not for the
    host, and do not depend on how prefills and decodes happen to follow each other: they tell placements apart where
    the latencies of requests are too noisy. The server must log milliseconds.
    """
    most = max((line.new_tokens for line in lines if not line.decode), default=0)
    before: dict[str, BatchLine] = {}
    seconds = []
    for line in lines:
        previous = before.get(line.rank)
        if previous is not None and previous.new_tokens == line.new_tokens == most:
            seconds.append(line.time - previous.time)
        before[line.rank] = line
    if most == 0 or len(seconds) < _FEWEST_PREFILLS:
        return {}
    return {
        "full_prefill_ms": round(1000 * median(seconds), 2),
        "full_prefill_tokens": float(most),
        "full_prefills": float(len(seconds)),
    }


@dataclass(frozen=True)
class DecodePeriod:
    """Passes of one scheduler from ``begin`` to ``end``, Unix times, with ``running`` requests, and their mean."""

    begin: float
    end: float
    running: int
    step_ms: float


def decode_periods(text: str) -> list[DecodePeriod]:
    """Between each two lines of a scheduler that follow each other and are of as many requests: a line's rate is that
    of the passes since the line before."""
    found = []
    before: dict[str, tuple[str, int, float]] = {}
    for line in text.splitlines():
        match, rate = _BATCH.match(line), _RATE.search(line)
        if match is None:
            continue
        now, time = (match["phase"], int(match["running"])), unix_time(match["time"])
        *same, begin = before.get(match["rank"], ("", 0, 0.0))
        if now[0] == "Decode" and rate is not None and tuple(same) == now and float(rate["rate"]) > 0:
            found.append(DecodePeriod(begin, time, now[1], 1000 * now[1] / float(rate["rate"])))
        before[match["rank"]] = (*now, time)
    return found


def decode_steps(text: str) -> dict[str, float]:
    """``decode_step_ms``: of a scheduler's decode passes with the most requests, median over its log's lines
    (:func:`decode_periods`), and ``decode_step_requests`` of a rank in one. Empty without such lines."""
    periods = decode_periods(text)
    most = max((period.running for period in periods), default=0)
    if most == 0:
        return {}
    steps = [period.step_ms for period in periods if period.running == most]
    return {"decode_step_ms": round(median(steps), 4), "decode_step_requests": float(most)}
