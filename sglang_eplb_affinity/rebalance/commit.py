"""Putting one layer in force between two forward passes: weights from staging, and the maps, on the forward stream."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sglang_eplb_affinity.rebalance.layer_moves import LayerJob, LayerPlan
from sglang_eplb_affinity.rebalance.map_tables import MapTables, StagedTables
from sglang_eplb_affinity.rebalance.weights import LayerWeights, StagingBuffer, by_slot, widest


@dataclass(frozen=True)
class StagedLayer:
    """A layer that only waits for its commit. ``live`` and ``arrived``: as many pairs as tensors change."""

    plan: LayerPlan
    staging: StagingBuffer
    live: list[torch.Tensor]
    arrived: list[torch.Tensor]
    tables: StagedTables


class CommitTicket(Protocol):
    """One commit on its way. ``milliseconds``: how long the forward stream was taken; only once it is ``done``."""

    def done(self) -> bool: ...

    @property
    def milliseconds(self) -> float: ...


class Committer(Protocol):
    """See :class:`LayerCommitter`."""

    def prepare(self, plan: LayerPlan, job: LayerJob, staging: StagingBuffer) -> StagedLayer: ...

    def commit(self, staged: StagedLayer) -> CommitTicket: ...


class LayerCommitter:
    """Prepares commits in a background thread and carries them out on the thread that runs forward passes."""

    def __init__(self, weights: Mapping[int, LayerWeights], tables: MapTables, device: torch.device) -> None:
        self._weights, self._tables, self._device = weights, tables, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def prepare(self, plan: LayerPlan, job: LayerJob, staging: StagingBuffer) -> StagedLayer:
        """After the arrivals of ``job`` are in ``staging``; everything a commit needs is on the device afterwards."""
        weights = self._weights[plan.layer]
        weights.check_in_place()
        tensors = [widest(tensor) for tensor in weights.tensors]
        columns = [
            of_tensor.view(tensor.dtype) for of_tensor, tensor in zip(staging.columns(weights), tensors, strict=True)
        ]
        slots = by_slot(tensors, [arrival.slot for arrival in job.arrivals])
        parts = by_slot(columns, range(len(job.arrivals)))
        live = [tensor for of_slot in slots for tensor in of_slot]
        arrived = [part for of_expert in parts for part in of_expert]
        with torch.cuda.stream(self._stream):  # nothing on a CPU
            tables = self._tables.stage(plan)
            if self._stream is not None:
                self._stream.synchronize()
        return StagedLayer(plan, staging, live, arrived, tables)

    def commit(self, staged: StagedLayer) -> CommitTicket:
        """Never waits. An error here leaves a layer half done and must end the server; callers let it through."""
        if self._device.type != "cuda":
            began = time.perf_counter()
            self._copy(staged)
            return _HostTicket(1000 * (time.perf_counter() - began))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._copy(staged)
        end.record()
        staged.staging.released = end
        return _DeviceTicket(start, end, staged)

    def _copy(self, staged: StagedLayer) -> None:
        if staged.live:
            torch._foreach_copy_(staged.live, staged.arrived, non_blocking=True)
        self._tables.commit(staged.tables)


@dataclass(frozen=True)
class _HostTicket:
    milliseconds: float

    def done(self) -> bool:
        return True


class _DeviceTicket:
    def __init__(self, start: Any, end: Any, staged: StagedLayer) -> None:
        self._start, self._end = start, end
        self._staged: StagedLayer | None = staged  # its tensors must live until the copies are done

    def done(self) -> bool:
        if self._end.query():
            self._staged = None
            return True
        return False

    @property
    def milliseconds(self) -> float:
        return float(self._start.elapsed_time(self._end))
