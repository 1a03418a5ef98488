"""One server over time: readings since the monitor began, and the rounds that ended meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.monitor.reading import FIGURES, Placement, Reading

ROUNDS_KEPT = 200
LATENCY_SECONDS = 60.0


@dataclass
class PlacementHistory:
    """``values``: of the map in force, by figure, one for each round. ``rounds``: those that were seen to end."""

    values: dict[str, deque[float]] = field(
        default_factory=lambda: {figure: deque(maxlen=ROUNDS_KEPT) for figure in FIGURES}
    )
    rounds: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=ROUNDS_KEPT))
    last: Placement | None = None

    def add(self, now: Placement) -> None:
        last, self.last = self.last, now
        if last is not None and now.last_round == last.last_round:
            return
        for figure, values in self.values.items():
            value = now.in_force(figure)
            if value is not None:
                values.append(value)
        ended = self._ended(last, now) if last is not None else []
        known = last is not None and last.record == now.record
        if now.record is not None and not known:
            ended[-1:] = [now.record]
        self.rounds.extend({"time": now.last_round, **record} for record in ended)

    @staticmethod
    def _ended(last: Placement, now: Placement) -> list[Mapping[str, Any]]:
        """From the counters, which is all there is of rounds between two readings but the last of them."""
        results = [result for result, count in now.rounds.items() for _ in range(count - last.rounds.get(result, 0))]
        if len(results) != 1:
            return [{"result": result} for result in results]
        experts, moved = now.moved_experts - last.moved_experts, now.moved_bytes - last.moved_bytes
        return [{"result": results[0], "moved_experts": experts, "moved_bytes": moved}]


@dataclass
class ServerHistory:
    """``latest``: the last reading, with the latencies of the last minute; the first one has those since the start of
    the server. ``error``: why there is no newer one. ``ttft``, ``tpot``: seconds, one of each later reading."""

    url: str
    latest: Reading | None = None
    error: str | None = None
    placements: dict[str | None, PlacementHistory] = field(default_factory=dict)
    tpot: deque[float] = field(default_factory=lambda: deque(maxlen=ROUNDS_KEPT))
    ttft: deque[float] = field(default_factory=lambda: deque(maxlen=ROUNDS_KEPT))
    _recent: deque[Reading] = field(default_factory=deque)

    def add(self, found: Reading | InputError) -> None:
        if isinstance(found, InputError):
            self.error = str(found)
            return
        self.error = None
        self._recent.append(found)
        while len(self._recent) > 2 and found.time - self._recent[1].time >= LATENCY_SECONDS:
            self._recent.popleft()
        first = len(self._recent) == 1
        self.latest = found if first else _since(found, self._recent[0])
        for values, value in ((self.ttft, self.latest.ttft_p99), (self.tpot, self.latest.tpot_mean)):
            if value is not None and not first:
                values.append(value)
        for placement in found.placements:
            self.placements.setdefault(placement.dp_rank, PlacementHistory()).add(placement)


def _since(now: Reading, earlier: Reading) -> Reading:
    """``now`` with the latencies of what ended after ``earlier``."""
    ttft = now.ttft.since(earlier.ttft) if now.ttft and earlier.ttft else now.ttft
    tpot = now.tpot.since(earlier.tpot) if now.tpot and earlier.tpot else now.tpot
    return replace(now, ttft=ttft, tpot=tpot)
