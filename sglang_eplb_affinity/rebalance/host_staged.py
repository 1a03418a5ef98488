"""Across hosts, and on CPU servers: experts travel as gloo messages through host memory.

On a CPU the live slot is sent and the staging row received into directly. On a GPU both go through pinned buffers and
a side stream. All receives of a layer are posted before anything is sent, so no order of sends can block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sglang_eplb_affinity.rebalance.layer_moves import Arrival, LayerJob
from sglang_eplb_affinity.rebalance.weights import LayerWeights, StagingBuffer

logger = logging.getLogger(__name__)

SEND_CHUNK = 4  # experts in pinned memory on their way out


Slots = Sequence[tuple[torch.Tensor, ...]]  # one tensor of each kind for each expert


def copy_all(sources: Slots, targets: Slots) -> None:
    for of_source, of_target in zip(sources, targets, strict=True):
        for source, target in zip(of_source, of_target, strict=True):
            target.copy_(source, non_blocking=True)


class HostStagedTransfer:
    """``global_rank``: rank of the default process group for each expert-parallel rank. ``near``: ranks that another
    path serves (their arrivals are left out here); empty on a CPU, where local moves are copies. A message that
    takes longer than ``limit_seconds`` breaks the connection: later transfers fail at once, and say why."""

    def __init__(
        self,
        weights: Mapping[int, LayerWeights],
        rank: int,
        global_rank: Callable[[int], int],
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        near: frozenset[int] = frozenset(),
        rows: int = 0,
        row_bytes: int = 0,
        limit_seconds: float = 60.0,
    ) -> None:
        self._weights, self._rank, self._global_rank = weights, rank, global_rank
        self._group, self._device, self._near = group, device, near
        self._limit = timedelta(seconds=limit_seconds)
        self._broken: Exception | None = None
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._landing = StagingBuffer(rows, row_bytes, "cpu")
            self._outgoing = StagingBuffer(SEND_CHUNK, row_bytes, "cpu")
            self._landing.rows = self._landing.rows.pin_memory()
            self._outgoing.rows = self._outgoing.rows.pin_memory()

    def run(self, job: LayerJob, staging: StagingBuffer) -> None:
        if self._broken is not None:
            raise RuntimeError(f"an earlier transfer broke the connection: {self._broken}")
        far = [(row, arrival) for row, arrival in enumerate(job.arrivals) if arrival.source_rank not in self._near]
        try:
            # A rank that cannot read its own weights still sends, so that nobody waits for ever; the round is given up.
            failure = self._exchange(job, far, staging)
        except Exception as error:
            self._broken = error
            raise
        if failure is not None:
            raise failure

    def _exchange(self, job: LayerJob, far: list[tuple[int, Arrival]], staging: StagingBuffer) -> Exception | None:
        weights = self._weights[job.layer]
        local = [(row, arrival) for row, arrival in far if arrival.source_rank == self._rank]
        remote = [(row, arrival) for row, arrival in far if arrival.source_rank != self._rank]
        landing = staging if self._stream is None else self._landing
        receives: list[Any] = []
        for (_, arrival), parts in zip(remote, landing.parts(weights, [row for row, _ in remote]), strict=True):
            source = self._global_rank(arrival.source_rank)
            for number, part in enumerate(parts):
                tag = _tag(arrival.slot, number, len(parts))
                receives.append(dist.irecv(part, source, group=self._group, tag=tag))
        failure = self._send(job, weights)
        try:
            self.copy_local(job, local, staging)
        except Exception as error:
            failure = failure or error
        for work in receives:
            work.wait(self._limit)
        if self._stream is not None:
            self._land(remote, weights, staging)
        return failure

    def _send(self, job: LayerJob, weights: LayerWeights) -> Exception | None:
        failure: Exception | None = None
        for start in range(0, len(job.departures), SEND_CHUNK):
            chunk = job.departures[start : start + SEND_CHUNK]
            sends: list[Any] = []
            live = weights.slots(departure.slot for departure in chunk)
            parts = live if self._stream is None else self._outgoing.parts(weights, range(len(chunk)))
            try:
                self.read(live, parts)
            except Exception as error:
                failure = failure or error
            for departure, of_expert in zip(chunk, parts, strict=True):
                target = self._global_rank(departure.target_rank)
                for number, part in enumerate(of_expert):
                    tag = _tag(departure.target_slot, number, len(of_expert))
                    sends.append(dist.isend(part, target, group=self._group, tag=tag))
            for work in sends:
                work.wait(self._limit)
        return failure

    def read(self, live: Slots, parts: Slots) -> None:
        """Bring live slots into host memory; on a CPU they are there."""
        if self._stream is None:
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            copy_all(live, parts)
            self._stream.synchronize()

    def copy_local(self, job: LayerJob, local: list[tuple[int, Arrival]], staging: StagingBuffer) -> None:
        """Moves between slots of this rank (only where no other path serves them)."""
        if not local:
            return
        weights = self._weights[job.layer]
        parts = staging.parts(weights, [row for row, _ in local])
        slots = weights.slots(arrival.source_slot for _, arrival in local)
        with torch.cuda.stream(self._stream):  # nothing on a CPU
            self._wait_until_released(staging)
            copy_all(slots, parts)
            if self._stream is not None:
                self._stream.synchronize()

    def _wait_until_released(self, staging: StagingBuffer) -> None:
        if self._stream is not None and staging.released is not None:
            self._stream.wait_event(staging.released)

    def _land(self, remote: list[tuple[int, Arrival]], weights: LayerWeights, staging: StagingBuffer) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._wait_until_released(staging)
            rows = [row for row, _ in remote]
            copy_all(self._landing.parts(weights, rows), staging.parts(weights, rows))
            self._stream.synchronize()


def _tag(target_slot: int, number: int, tensors: int) -> int:
    """Of tensor ``number`` of ``tensors`` of an expert: unique among the messages between two ranks for one layer."""
    return target_slot * tensors + number
