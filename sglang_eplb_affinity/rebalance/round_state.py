"""What one round has come to so far on this rank, and the record it leaves."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sglang_eplb_affinity.rebalance.background import Task
from sglang_eplb_affinity.rebalance.commit import CommitTicket, StagedLayer
from sglang_eplb_affinity.rebalance.delivery import Delivery
from sglang_eplb_affinity.rebalance.layer_moves import KEEPS, LayerPlan
from sglang_eplb_affinity.rebalance.plan_round import PlanReply
from sglang_eplb_affinity.rebalance.round_record import Result, RoundRecord


@dataclass
class RoundState:
    """Times are time.perf_counter(), 0 before they are reached.

    ``in_flight``: layers that are being staged, in the order of the plan. ``started``, ``committed``: layers of the
    plan so far. ``failed_phase``: what this rank could not do; ``given_up``: why all ranks gave the round up.
    """

    number: int
    began_pass: int
    plan_task: Task[PlanReply]
    began: float = field(default_factory=time.perf_counter)
    planned: float = 0.0
    moved: float = 0.0
    reply: PlanReply = PlanReply("failed", "no plan")  # noqa: RUF009 (frozen)
    in_flight: deque[tuple[LayerPlan, Task[StagedLayer]]] = field(default_factory=deque)
    started: int = 0
    committed: int = 0
    tickets: list[CommitTicket] = field(default_factory=list)
    failed_phase: str | None = None
    failure: str = ""
    given_up: str = ""

    @property
    def result(self) -> Result:
        if self.given_up:
            return "failed"
        return "applied" if self.reply.result == "planned" else self.reply.result

    def moving(self) -> list[tuple[str, float]]:
        """Layers that are being staged: what to call it, and since when (time.monotonic())."""
        found = [(f"moving layer {plan.layer}", task.running_since) for plan, task in list(self.in_flight)]
        return [(name, since) for name, since in found if since is not None]

    def record(
        self, algorithm: str, passes: int, slots_per_gpu: int, bytes_per_expert: Mapping[int, int]
    ) -> RoundRecord:
        """``bytes_per_expert`` by layer; all tickets must be done."""
        now, reply = time.perf_counter(), self.reply
        committed = reply.layers[: self.committed]
        travelled = [_from_other_gpus(plan, slots_per_gpu) for plan in committed]
        phases = {"plan": reply.seconds}
        if self.planned:
            phases = {"gather": self.planned - self.began - reply.seconds, **phases}
            if self.moved:
                phases |= {"move": self.moved - self.planned, "end": now - self.moved}
        return RoundRecord(
            result=self.result,
            algorithm=algorithm,
            round=self.number,
            mode="asynchronous",
            tokens=reply.tokens,
            moved_experts=sum(travelled),
            moved_bytes=sum(
                count * bytes_per_expert.get(plan.layer, 0) for count, plan in zip(travelled, committed, strict=True)
            ),
            committed_layers=tuple(plan.layer for plan in committed),
            before=reply.before,
            after=None if self.given_up else reply.after,
            contiguous=reply.contiguous,
            phase_seconds=phases,
            commit_ms=tuple(ticket.milliseconds for ticket in self.tickets),
            passes=passes - self.began_pass,
            seconds=(self.moved or now) - self.began,
            reason=self.given_up or reply.reason,
            routing_checksum=reply.routing_checksum,
            delivery=_committed_only(reply.delivery, committed),
            history=reply.history,
        )


def _committed_only(delivery: Delivery | None, committed: Sequence[LayerPlan]) -> Delivery | None:
    layers = {plan.layer for plan in committed}
    return delivery and replace(delivery, returned=tuple(layer for layer in delivery.returned if layer in layers))


def _from_other_gpus(plan: LayerPlan, slots_per_gpu: int) -> int:
    gpu = np.arange(len(plan.source)) // slots_per_gpu
    return int(((plan.source != KEEPS) & (plan.source // slots_per_gpu != gpu)).sum())
