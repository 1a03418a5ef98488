"""What one finished rebalance round did: the log line, the metrics and the recorded map are all made from this."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.rebalance.delivery import Delivery
from sglang_eplb_affinity.rebalance.map_history import MapHistory

logger = logging.getLogger(__name__)

Result = Literal["applied", "unchanged", "skipped", "failed"]
Mode = Literal["synchronous", "asynchronous"]


@dataclass(frozen=True)
class RoundRecord:
    """One round, as rank 0 saw it.

    ``result``: ``applied`` (all planned layers are in force), ``unchanged`` (the plan equals the map in force, or no
    layer gains enough), ``skipped`` (nothing recorded), ``failed`` (see ``reason``; ``committed_layers`` of them are in
    force, the others keep their map). ``tokens``: token-expert assignments of the layer that has most.
    ``moved_experts``: slots whose expert came from another GPU; ``moved_bytes``: their weights, over all ranks; None
    where it is not known. ``committed_layers``: layers whose map changed. ``contiguous``: figures of SGLang's start
    placement; ``before``, ``after``: of the maps before and after the round; all on the window that was planned on.
    ``phase_seconds``: wall time by phase.
    ``commit_ms``: for each committed layer the time that the forward passes stood still for it on this rank.
    ``passes``: forward passes from the trigger to the end of the round. ``routing_checksum``: SHA-256 of the window's
    counts and token sample. ``delivery``: what the map in force gave on that window, beside what was promised.
    ``history``: what is known of maps after the round.
    """

    result: Result
    algorithm: str
    round: int
    mode: Mode = "synchronous"
    tokens: int = 0
    moved_experts: int = 0
    moved_bytes: int | None = None
    committed_layers: tuple[int, ...] = ()
    before: MapFigures | None = None
    after: MapFigures | None = None
    contiguous: MapFigures | None = None
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    commit_ms: tuple[float, ...] = ()
    passes: int = 0
    seconds: float = 0.0
    reason: str | None = None
    routing_checksum: str | None = None
    delivery: Delivery | None = None
    history: MapHistory | None = None

    def to_json(self) -> dict[str, Any]:
        """The log line: flat, figures as ``NAME_contiguous``, ``NAME_before`` and ``NAME_after``, phases as
        ``PHASE_seconds``."""
        line: dict[str, Any] = {
            "result": self.result,
            "algorithm": self.algorithm,
            "round": self.round,
            "mode": self.mode,
            "tokens": self.tokens,
            "moved_experts": self.moved_experts,
            "moved_layers": len(self.committed_layers),
        }
        if self.moved_bytes is not None:
            line["moved_bytes"] = self.moved_bytes
        for when, figures in (("contiguous", self.contiguous), ("before", self.before), ("after", self.after)):
            if figures is not None:
                for name in MapFigures.__dataclass_fields__:
                    line[f"{name}_{when}"] = round(getattr(figures, name), 4)
        if self.delivery is not None:
            line |= self.delivery.to_json()
        for phase, seconds in self.phase_seconds.items():
            line[f"{phase}_seconds"] = round(seconds, 4)
        if self.commit_ms:
            line["commit_ms"] = [round(value, 3) for value in self.commit_ms]
        if self.passes:
            line["passes"] = self.passes
        line["seconds"] = round(self.seconds, 4)
        if self.reason:
            line["reason"] = self.reason
        return line


class RoundObserver(Protocol):
    """Told on rank 0 after every finished round; what it raises is logged and does not reach the server."""

    def round_finished(self, record: RoundRecord, in_force: ExpertMap) -> None:
        """``in_force``: the map after the round."""


def report(record: RoundRecord, in_force: ExpertMap, observers: list[RoundObserver]) -> None:
    """Log the round's line, then tell the observers. Never raises: a log line must not stop the server."""
    try:
        logger.info("[eplb-affinity] rebalance %s", json.dumps(record.to_json()))
    except Exception:
        logger.exception("[eplb-affinity] rebalance %s, but its line could not be written", record.result)
    for observer in observers:
        try:
            observer.round_finished(record, in_force)
        except Exception:
            logger.exception("[eplb-affinity] %s failed on round %d", type(observer).__name__, record.round)


def routing_checksum(window: RoutingWindow) -> str:
    """SHA-256 in hex of the window's counts and token sample."""
    digest = hashlib.sha256(np.ascontiguousarray(window.counts, dtype="<i8").tobytes())
    if window.tokens is not None:
        digest.update(np.ascontiguousarray(window.tokens, dtype="<i2").tobytes())
    return digest.hexdigest()
