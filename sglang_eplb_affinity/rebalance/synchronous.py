"""Rounds for which serving stops: SGLang's manager calls for them and moves the weights (rebalancer.py has the others).

One rank, the first that lives, plans and broadcasts the map, so that all ranks agree even if they were given different
planners. Any failure to plan keeps the map that is in force, or what is left of it where ranks are gone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sglang_eplb_affinity.dispatch.evaluate import moved_experts
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.rebalance.first_rank import from_one_rank, this_rank
from sglang_eplb_affinity.rebalance.map_history import Comparison, MapHistory, compare
from sglang_eplb_affinity.rebalance.plan_round import (
    PlanRequest,
    PlanSettings,
    choose_layers,
    figures_of_round,
    judging_of,
    next_history,
)
from sglang_eplb_affinity.rebalance.round_record import Result, RoundRecord

logger = logging.getLogger(__name__)

Report = Callable[[RoundRecord, ExpertMap], None]


class SynchronousRounds:
    """One for each rank. ``algorithm``: the server's, whoever plans. ``first_rank`` plans and is told
    ``report``: rank 0 unless that is gone.

    ``planned``: the first map in force was planned, not SGLang's start placement, so that the first round may improve
    on it. ``device``: where a broadcast's message must be. ``history``: of the map at the start; kept on the
    first rank. ``remark``: goes into each round's reason, and tells which ranks the rounds are for.
    """

    def __init__(
        self,
        settings: PlanSettings,
        algorithm: str,
        report: Report,
        device: Any,
        *,
        planned: bool = False,
        history: MapHistory | None = None,
        first_rank: int = 0,
        remark: str | None = None,
    ) -> None:
        self.history = history
        self.first_rank, self.remark = first_rank, remark
        self.settings, self.algorithm, self.report, self.device = settings, algorithm, report, device
        self.planned = planned
        self.number = 0

    def begin(self, window: RoutingWindow, current: ExpertMap, may_stay: bool = True) -> SynchronousRound:
        """``window``: the same on all ranks; ``current``: the map in force.

        ``may_stay`` False: SGLang's tables are others than those of ``current``, so the round puts a map in force.
        """
        self.number += 1
        return SynchronousRound(self, window, current, may_stay)


class SynchronousRound:
    """From the recorded window to the record. Every rank makes the same calls."""

    def __init__(
        self, rounds: SynchronousRounds, window: RoutingWindow, current: ExpertMap, may_stay: bool = True
    ) -> None:
        self._rounds, self._window, self._before, self._may_stay = rounds, window, current, may_stay
        self._number = rounds.number
        self._started = self._planned_at = time.perf_counter()
        self._phase_seconds: dict[str, float] = {}
        self._reason: str | None = None
        self._comparison: Comparison | None = None

    def plan(self) -> ExpertMap | None:
        """A collective call: the map to put in force, None to keep it (nothing recorded, no gain, or a failure)."""
        if not self._window.counts.any():
            # The window is the same on all ranks, so all of them return here.
            return self._keep("skipped", "no tokens recorded")
        rounds, before = self._rounds, self._before
        request = PlanRequest(self._window, before, rounds.settings, not rounds.planned, rounds.history)

        def choose() -> np.ndarray:
            choice = choose_layers(request)
            self._reason, self._comparison = choice.reason, choice.comparison
            return choice.planned.physical_to_logical

        answer = from_one_rank(choose, before.physical_to_logical.shape, rounds.device, rounds.first_rank)
        self._planned_at = time.perf_counter()
        self._phase_seconds["plan"] = self._planned_at - self._started
        if answer.error is not None and not isinstance(answer.error, InputError):
            logger.error("[eplb-affinity] planning failed; the map in force stays", exc_info=answer.error)
        if answer.rows is None:
            return self._keep("failed", f"{type(answer.error).__name__}: {answer.error}")
        if np.array_equal(answer.rows, before.physical_to_logical):
            return self._keep("unchanged", self._reason)
        return ExpertMap(answer.rows, before.num_experts)

    def _keep(self, result: Result, reason: str | None) -> ExpertMap | None:
        """Nothing better was planned: the map in force stays, or is put in force anew."""
        if not self._may_stay:
            self._reason = reason
            return self._before
        self._report(result, self._before, {}, reason)
        return None

    def finish(self, planned: ExpertMap, bytes_per_expert: Mapping[int, int]) -> None:
        """The new map is in force on this rank. ``bytes_per_expert``: of every layer with experts, by layer."""
        self._rounds.planned = True
        self._phase_seconds["move"] = time.perf_counter() - self._planned_at
        # SGLang's algorithms place dense layers too, but only layers with experts move.
        layers = sorted(bytes_per_expert)
        ids = self._before.physical_to_logical.copy()
        ids[layers] = planned.physical_to_logical[layers]
        self._report("applied", ExpertMap(ids, self._before.num_experts), bytes_per_expert, self._reason)

    def _report(
        self, result: Result, after: ExpertMap, bytes_per_expert: Mapping[int, int], reason: str | None = None
    ) -> None:
        if this_rank() != self._rounds.first_rank:
            return
        reason = "; ".join(text for text in (self._rounds.remark, reason) if text) or None
        try:
            record = self._record(result, after, bytes_per_expert, reason)
        except Exception:  # figures must not stop the server
            logger.exception("[eplb-affinity] rebalance %s, but its figures could not be computed", result)
            return
        self._rounds.report(record, after)

    def _record(
        self, result: Result, after: ExpertMap, bytes_per_expert: Mapping[int, int], reason: str | None
    ) -> RoundRecord:
        settings = self._rounds.settings
        figures = figures_of_round(self._window, self._before, after, settings)
        # SGLang's own algorithms, and plans that failed, have compared nothing yet.
        comparison = self._comparison or compare(
            self._rounds.history, self._window, self._before, judging_of(self._window, settings)
        )
        if comparison is not None:
            history = next_history(comparison, self._window, self._before, after, settings)
            figures |= {"delivery": comparison.delivery, "history": history}
            self._rounds.history = history
        moved = moved_experts(self._before, after, settings.topology)
        changed = np.flatnonzero((self._before.physical_to_logical != after.physical_to_logical).any(1))
        return RoundRecord(
            result=result,
            algorithm=self._rounds.algorithm,
            round=self._number,
            moved_experts=int(moved.sum()),
            moved_bytes=sum(int(moved[layer]) * size for layer, size in bytes_per_expert.items()),
            committed_layers=tuple(changed.tolist()),
            phase_seconds=self._phase_seconds,
            seconds=time.perf_counter() - self._started,
            reason=reason,
            **figures,
        )
