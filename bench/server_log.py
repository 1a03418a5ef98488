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
LOG_TIME = re.compile(r"^\[(?P<time>\d{4}-[\d-]+ [\d:.]+)")


@dataclass(frozen=True)
class BatchLine:
    """One batch as a scheduler logged it: Unix time, its rank, whether it decoded, requests running and waiting."""

    time: float
    rank: str
    decode: bool
    running: int
    queue: int


def batch_lines(text: str) -> list[BatchLine]:
    found = []
    for line in text.splitlines():
        if match := _BATCH.match(line):
            found.append(
                BatchLine(
                    unix_time(match["time"]),
                    match["rank"].strip(),
                    match["phase"] == "Decode",
                    int(match["running"]),
                    int(match["queue"]),
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
