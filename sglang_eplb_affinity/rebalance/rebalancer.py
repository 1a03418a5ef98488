"""Asynchronous rebalancing: one round at a time, beside the forward passes.

``on_forward_pass_end`` is all that the serving thread does; it never waits for planning or for weights. Whatever this
rank does because of other ranks follows from an agreed word (agreement.py), hence at the same pass everywhere:

    waiting    every ``interval`` passes the recorded window is copied off the device
    planning   a thread sums the windows over ranks, the planner process plans, all ranks receive the plan
    moving     up to ``layers_in_flight`` layers are staged by another thread; a layer that ALL ranks have staged is
               committed by all between the same two passes, and its staging buffer takes the next layer
    ending     until every rank's commits are done; only then may the next round read or overwrite weights

A failure on any rank gives up the layers that are not committed yet. What is committed is whole and stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.rebalance.agreement import Agreement, failure_text, failure_word
from sglang_eplb_affinity.rebalance.background import BackgroundThread
from sglang_eplb_affinity.rebalance.commit import Committer, StagedLayer
from sglang_eplb_affinity.rebalance.config import AsyncConfig
from sglang_eplb_affinity.rebalance.layer_moves import LayerPlan, job_of
from sglang_eplb_affinity.rebalance.plan_round import PlanReply
from sglang_eplb_affinity.rebalance.planner_client import START_SECONDS
from sglang_eplb_affinity.rebalance.round_record import RoundRecord
from sglang_eplb_affinity.rebalance.round_state import RoundState
from sglang_eplb_affinity.rebalance.transfer import ExpertTransfer
from sglang_eplb_affinity.rebalance.weights import StagingBuffer
from sglang_eplb_affinity.rebalance.window_exchange import WindowShare, WindowSource

logger = logging.getLogger(__name__)

PlanRound = Callable[[WindowShare, ExpertMap, bool], PlanReply]
Report = Callable[[RoundRecord, ExpertMap], None]


class Phase(Enum):
    WAITING = "waiting"
    PLANNING = "planning"
    MOVING = "moving"
    ENDING = "ending"
    FROZEN = "frozen"


@dataclass(frozen=True)
class Parts:
    """What a rebalancer works with. ``staging``: one buffer for each layer in flight.

    ``plan`` runs in a background thread on every rank (a collective call). ``report`` is told on rank 0, in a thread;
    None on the others. ``bytes_per_expert`` by layer, for the record. ``verify`` is called after each round.
    """

    window: WindowSource
    plan: PlanRound
    transfer: ExpertTransfer
    committer: Committer
    staging: tuple[StagingBuffer, ...]
    agreement: Agreement
    bytes_per_expert: Mapping[int, int]
    report: Report | None = None
    verify: Callable[[ExpertMap], object] | None = None


class AsyncRebalancer:
    """One for each rank. ``rank`` is the expert-parallel rank, ``prepare`` what each background thread does first.

    ``planned``: ``current`` was planned, not SGLang's start placement, so that the first round may improve on it.
    """

    def __init__(
        self,
        config: AsyncConfig,
        parts: Parts,
        current: ExpertMap,
        *,
        algorithm: str,
        rank: int,
        num_ranks: int,
        planned: bool = False,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        self._config, self._parts, self._algorithm, self._rank = config, parts, algorithm, rank
        self._slots_per_gpu = current.num_slots // num_ranks
        self._num_experts = current.num_experts
        self._rows = current.physical_to_logical.copy()
        self._planning = BackgroundThread("eplb-plan", prepare)
        self._moving = BackgroundThread("eplb-move", prepare)
        self._reporting = BackgroundThread("eplb-report", prepare)
        self._phase = Phase.WAITING
        self._round: RoundState | None = None
        self._passes, self._number, self._applied = 0, 0, planned
        self._due = config.warm_up + config.interval
        self._stale_word = False
        self._waits_since: float | None = None
        self._warned_at = float("-inf")

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def rounds(self) -> int:
        """Rounds begun."""
        return self._number

    @property
    def in_force(self) -> ExpertMap:
        return ExpertMap(self._rows.copy(), self._num_experts)

    # ---- what the serving thread calls ----

    def on_forward_pass_end(self) -> None:
        """After each forward pass was enqueued, on the stream it runs on."""
        self._passes += 1
        if self._phase is Phase.FROZEN:
            return
        if self._passes == self._config.warm_up:
            self._parts.window.start()
        if self._phase is Phase.WAITING:
            if self._passes >= self._due:
                self._begin()
            return
        word = self._agreed_word()
        if word is not None:
            self._act_on(word)
        if self._phase in (Phase.PLANNING, Phase.MOVING, Phase.ENDING) and not self._parts.agreement.under_way:
            self._parts.agreement.hand_in(self._own_word())

    def weights_changed(self) -> None:
        """New weights were loaded into the model, on all ranks between the same two passes: what is staged is old."""
        if self._phase is Phase.MOVING:
            self._give_up("the model's weights were updated")
            self._stale_word = self._parts.agreement.under_way

    # ---- what a watchdog thread calls ----

    def check_time(self) -> None:
        """Name a phase that lasts too long, and give the round up."""
        now, limit, found = time.monotonic(), self._config.phase_limit_seconds, self._round
        if found is None or now - self._warned_at < limit:
            return
        running = [(name, since, limit) for name, since in found.moving()]
        if found.plan_task.running_since is not None:
            # The planner has its own limit; this is for everything around it, and a planner may be starting anew.
            running.append(("planning", found.plan_task.running_since, START_SECONDS + 2 * limit))
        if self._waits_since is not None:
            running.append(("waiting for the other ranks' word", self._waits_since, limit))
        for name, since, limit in running:
            if now - since > limit:
                self._warned_at = now
                logger.error(
                    "[eplb-affinity] round %d on rank %d: %s takes %.0f s (limit %g s); the map in force stays",
                    found.number, self._rank, name, now - since, limit,
                )  # fmt: skip
                self._fail(found, "time limit", f"{name} took longer than {limit:g} s")
                return

    # ---- the phases ----

    def _begin(self) -> None:
        self._number += 1
        self._due = self._passes + self._config.interval
        try:
            share = self._parts.window.take()
        except Exception as error:
            logger.exception("[eplb-affinity] rank %d could not read its recorder", self._rank)
            share = _NoShare(error)
        current, first = self.in_force, not self._applied
        task = self._planning.submit(lambda: self._parts.plan(share, current, first))
        self._round = RoundState(self._number, self._passes, task)
        self._phase = Phase.PLANNING

    def _agreed_word(self) -> int | None:
        self._waits_since = time.monotonic()
        word = self._parts.agreement.take()
        self._waits_since = None
        if word is not None and self._stale_word:
            self._stale_word = False
            return None
        return word

    def _own_word(self) -> int:
        """Progress within the phase, or a negative word for a failure; see agreement.py."""
        now = self._running_round()
        if self._phase is Phase.ENDING:
            return int(self._drained(now))
        word = 0
        if self._phase is Phase.MOVING:
            word = now.committed + self._staged(now)
        elif now.plan_task.done():
            word = 1
            if now.plan_task.error is not None:
                self._fail(now, "planning", now.plan_task.error)
        return word if now.failed_phase is None else failure_word(self._rank, now.failed_phase)

    def _act_on(self, word: int) -> None:
        now = self._running_round()
        if self._phase is Phase.ENDING:
            if word:
                self._finish(now)
        elif word < 0:
            self._give_up(now.failure or failure_text(word))
        elif self._phase is Phase.PLANNING and word:
            now.reply, now.planned = now.plan_task.result(), time.perf_counter()
            if now.reply.result == "planned":
                self._phase = Phase.MOVING
                self._start_layers(now)
            else:
                self._finish(now)
        elif self._phase is Phase.MOVING:
            while now.committed < word:
                self._commit_next(now)
            if now.committed == len(now.reply.layers):
                now.moved = time.perf_counter()
                self._phase = Phase.ENDING
            else:
                self._start_layers(now)

    def _start_layers(self, now: RoundState) -> None:
        """Give every free staging buffer a layer. All ranks do so at the same pass, so the queues stay alike."""
        buffers = self._parts.staging
        while len(now.in_flight) < len(buffers) and now.started < len(now.reply.layers):
            plan, staging = now.reply.layers[now.started], buffers[now.started % len(buffers)]
            now.in_flight.append((plan, self._moving.submit(lambda p=plan, s=staging: self._stage(p, s))))  # type: ignore[misc]
            now.started += 1

    def _stage(self, plan: LayerPlan, staging: StagingBuffer) -> StagedLayer:
        job = job_of(plan, self._rank, self._slots_per_gpu)
        self._parts.transfer.run(job, staging)
        return self._parts.committer.prepare(plan, job, staging)

    def _staged(self, now: RoundState) -> int:
        """How many of the layers in flight have arrived, counted from the first."""
        count = 0
        for plan, task in now.in_flight:
            if not task.done():
                break
            if task.error is not None:
                self._fail(now, "movement", task.error, f"layer {plan.layer}: ")
                break
            count += 1
        return count

    def _commit_next(self, now: RoundState) -> None:
        plan, task = now.in_flight.popleft()
        now.tickets.append(self._parts.committer.commit(task.result()))
        self._rows[plan.layer] = plan.slots
        now.committed += 1

    def _drained(self, now: RoundState) -> bool:
        idle = self._planning.idle() and self._moving.idle()
        return idle and all([ticket.done() for ticket in now.tickets])

    def _give_up(self, reason: str) -> None:
        now = self._running_round()
        now.given_up, now.moved = reason, time.perf_counter()
        self._phase = Phase.ENDING

    def _fail(self, now: RoundState, phase: str, error: object, where: str = "") -> None:
        """This rank cannot go on with the round; the others learn it with the next word."""
        if now.failed_phase is not None:
            return
        text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
        now.failure = f"{phase} failed on rank {self._rank}: {where}{text}"
        now.failed_phase = phase
        if isinstance(error, BaseException):
            logger.error("[eplb-affinity] round %d: %s", now.number, now.failure, exc_info=error)

    def _finish(self, now: RoundState) -> None:
        self._round = None
        self._applied |= now.result == "applied"
        freeze = self._config.run_once and now.result == "applied"
        self._phase = Phase.FROZEN if freeze else Phase.WAITING
        if freeze:
            logger.info("[eplb-affinity] --eplb-async-run-once: the map stays as it is from now on")
        if self._parts.verify is not None:
            self._parts.verify(self.in_force)
        report = self._parts.report
        if report is not None:
            record = now.record(self._algorithm, self._passes, self._slots_per_gpu, self._parts.bytes_per_expert)
            in_force = self.in_force
            self._reporting.submit(lambda: report(record, in_force))

    def _running_round(self) -> RoundState:
        assert self._round is not None
        return self._round


class _NoShare:
    """In place of a window that could not be read, so that this rank still takes part in the exchange."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def wait(self) -> NoReturn:
        raise self._error
