"""What a server log says about rebalances."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from bench.figures.server_log import LOG_TIME

# One line for each rebalance from rank 0 of the patched server.
_RECORD = re.compile(r"\[eplb-affinity\] rebalance (\{.*\})\s*$")
# SGLang's own lines, one for each rank; they do not say whether any expert moved.
_UPSTREAM_END = re.compile(r"^\[(?P<time>[\d-]+ [\d:.]+)(?P<rank>[^\]]*)\] \[EPLBManager\] rebalance end")

WRONG_WEIGHTS = "holds wrong weights"  # verify.WRONG, without importing torch
APPLIED, UNCHANGED, FAILED, SKIPPED = "applied", "unchanged", "failed", "skipped"


@dataclass(frozen=True)
class Rebalance:
    """One rebalance as rank 0 saw it. ``*_before`` and ``*_after`` are the old and the new map on the window that
    the new map was planned on; None where the server did not measure it. Times in seconds."""

    result: str
    algorithm: str | None = None
    time: str | None = None  # of the log line, local time of the server
    moved_experts: int = 0
    moved_layers: int = 0
    balancedness_before: float | None = None
    balancedness_after: float | None = None
    gpu_fanout_before: float | None = None
    gpu_fanout_after: float | None = None
    node_fanout_before: float | None = None
    node_fanout_after: float | None = None
    remote_gpu_copies_before: float | None = None
    remote_gpu_copies_after: float | None = None
    remote_node_copies_before: float | None = None
    remote_node_copies_after: float | None = None
    mode: str | None = None  # synchronous or asynchronous
    round: int | None = None  # counted by the server from its start
    tokens: int | None = None  # token-expert assignments of the window, of the layer that has most
    reason: str | None = None  # why nothing was applied
    plan_seconds: float | None = None
    seconds: float | None = None
    commit_ms: tuple[float, ...] = ()  # of an asynchronous round, for each layer: how long serving stopped for it

    @staticmethod
    def of(values: Mapping[str, Any]) -> Rebalance:
        """From JSON, which has no tuples."""
        return Rebalance(**{**values, "commit_ms": tuple(map(float, values.get("commit_ms", ())))})

    @property
    def moved(self) -> bool:
        """Whether it really moved experts."""
        return self.result == APPLIED and self.moved_experts > 0


@dataclass(frozen=True)
class LogSummary:
    rebalances: tuple[Rebalance, ...]
    upstream_ends: int  # rebalances that SGLang itself reports as ended, counted on its first rank
    malformed: int = 0  # lines of ours that could not be read
    wrong_weights: int = 0  # checks of weights that found a slot with another expert's than the map says

    def with_result(self, result: str) -> int:
        return sum(r.result == result for r in self.rebalances)

    @property
    def moved(self) -> int:
        return sum(r.moved for r in self.rebalances)


_FIELDS = {f.name for f in fields(Rebalance)} - {"time"}


def parse_log(text: str) -> LogSummary:
    """Every rebalance in a server log, or in a part of it that starts at the beginning of a line."""
    found: list[Rebalance] = []
    malformed = 0
    ends: dict[str, int] = {}
    for line in text.splitlines():
        if "rebalance" not in line:
            continue
        if match := _RECORD.search(line):
            record = _read(match.group(1), line)
            if record is None:
                malformed += 1
            else:
                found.append(record)
        elif match := _UPSTREAM_END.match(line):
            ends[match.group("rank")] = ends.get(match.group("rank"), 0) + 1
    return LogSummary(tuple(found), max(ends.values(), default=0), malformed, text.count(WRONG_WEIGHTS))


def round_records(text: str) -> list[tuple[str | None, dict[str, Any]]]:
    """All that our lines of rounds say, and the local time of each (None: not logged); what cannot be read is left
    out."""
    found = []
    for line in text.splitlines():
        if match := _RECORD.search(line):
            stamp = LOG_TIME.match(line)
            with suppress(ValueError):
                data = json.loads(match.group(1))
                found.append((stamp.group("time") if stamp else None, data))
    return found


def _read(payload: str, line: str) -> Rebalance | None:
    try:
        data: dict[str, Any] = json.loads(payload)
        known = {key: value for key, value in data.items() if key in _FIELDS and value is not None}
        stamp = LOG_TIME.match(line)
        return Rebalance.of({**known, "time": stamp.group("time") if stamp else None})
    except (ValueError, TypeError, AttributeError):
        return None


def mean_of(rebalances: Sequence[Rebalance], field: str) -> float | None:
    """Mean of one field over the rebalances that have it; None when none has."""
    values = [value for r in rebalances if (value := getattr(r, field)) is not None]
    return sum(values) / len(values) if values else None
