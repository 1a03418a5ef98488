"""Within a host: pull experts from the live weights of other ranks through peer memory (CUDA IPC).

Every rank maps the expert weights of the others once, at start. A pull is a cudaMemcpyAsync on a side stream: between
GPUs that is the copy engines' work, which takes no SM, so it can neither slow nor deadlock with DeepEP's kernels, and
the rank pulled from takes no part. A slot that is being pulled from is not overwritten before all ranks have staged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sglang_eplb_affinity.rebalance.layer_moves import LayerJob
from sglang_eplb_affinity.rebalance.weights import LayerWeights, StagingBuffer

Handles = dict[int, list[tuple[Any, ...]]]


def export_handles(weights: Mapping[int, LayerWeights]) -> Handles:
    """What another process needs to map this rank's expert weights; one set for each process that will."""
    out: Handles = {}
    for layer, of_layer in weights.items():
        out[layer] = []
        for tensor in of_layer.tensors:
            shared = tensor.untyped_storage()._share_cuda_()
            out[layer].append((shared, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())))
    return out


def open_handles(handles: Handles, device: torch.device) -> dict[int, LayerWeights]:
    """The exporter's weights as tensors that this process's ``device`` can read, without a context on theirs.

    The memory is mapped for ``device`` (peer access); opening it on the exporter's device would cost a CUDA context
    of some hundred MB on every peer.
    """
    out: dict[int, LayerWeights] = {}
    with torch.cuda.device(device):
        for layer, tensors in handles.items():
            views = []
            for shared, offset, shape, stride in tensors:
                storage = torch.UntypedStorage._new_shared_cuda(device.index, *shared[1:])
                view = torch.empty(0, dtype=torch.uint8, device=device)
                views.append(view.set_(storage, offset, shape, stride))
            out[layer] = LayerWeights(tuple(views))
    return out


class PeerCopyTransfer:
    """``sources``: for every rank of this host, this rank included, its live weights by layer."""

    def __init__(self, sources: Mapping[int, Mapping[int, LayerWeights]], device: torch.device) -> None:
        self._sources, self._device = sources, device
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event(blocking=True)

    def begin(self, job: LayerJob, staging: StagingBuffer) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if staging.released is not None:
                self._stream.wait_event(staging.released)
            try:
                live = {rank: weights[job.layer] for rank, weights in self._sources.items()}
                rows = [row for row, arrival in enumerate(job.arrivals) if arrival.source_rank in live]
                for row, part in zip(rows, staging.parts(next(iter(live.values())), rows), strict=True):
                    arrival = job.arrivals[row]
                    self.pull(part, live[arrival.source_rank].tensors, arrival.source_slot)
            except Exception:
                self._stream.synchronize()  # nothing of this layer may still be read when the round is given up
                raise
            self._done.record(self._stream)

    def pull(self, part: tuple[torch.Tensor, ...], tensors: tuple[torch.Tensor, ...], slot: int) -> None:
        for target, tensor in zip(part, tensors, strict=True):
            target.copy_(tensor[slot], non_blocking=True)

    def finish(self) -> None:
        self._done.synchronize()

    def run(self, job: LayerJob, staging: StagingBuffer) -> None:
        self.begin(job, staging)
        self.finish()
