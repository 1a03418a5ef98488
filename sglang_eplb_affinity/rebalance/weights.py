"""Expert weights as bytes: the live tensors of each layer, and the staging buffers that arrivals land in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_eplb_affinity.domain.errors import InputError

ALIGNMENT = 256  # bytes; every tensor's part of a staging row starts at a multiple of it


def slot_bytes(tensor: torch.Tensor, what: str = "expert weights") -> torch.Tensor:
    """uint8 [slots, bytes] over the memory of ``tensor`` [slots, ...], whatever its dtype and inner strides.

    Covers each slot's bytes from its first to its last element, padding between them included. Raises InputError for a
    layout in which slots interleave.
    """
    tensor = tensor.detach()
    size = tensor.element_size()
    inner = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    span = (1 + sum((length - 1) * stride for length, stride in inner)) * size if tensor[0].numel() else 0
    step = tensor.stride(0) * size
    if tensor.shape[0] > 1 and step < span:
        raise InputError(f"--eplb-async: {what} of shape {tuple(tensor.shape)} do not keep an expert's bytes together")
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    offset = tensor.storage_offset() * size
    return flat.set_(tensor.untyped_storage(), offset, (tensor.shape[0], span), (max(step, span), 1))


@dataclass(frozen=True)
class LayerWeights:
    """One layer's expert weights on this rank: uint8 [local slots, bytes] for each tensor.

    ``lookup`` gives the model's tensors as they are at that moment; None for those of another process.
    """

    tensors: tuple[torch.Tensor, ...]
    lookup: Callable[[], Sequence[torch.Tensor]] | None = None

    @staticmethod
    def of(layer: int, lookup: Callable[[], Sequence[torch.Tensor]], local_slots: int) -> LayerWeights:
        tensors = lookup()
        for tensor in tensors:
            if tensor.dim() < 1 or tensor.shape[0] != local_slots:
                raise InputError(
                    f"--eplb-async: layer {layer} has expert weights of shape {tuple(tensor.shape)}, "
                    f"but this rank has {local_slots} slots"
                )
        return LayerWeights(tuple(slot_bytes(tensor, f"layer {layer}'s expert weights") for tensor in tensors), lookup)

    def check_in_place(self) -> None:
        """Raise RuntimeError if the model has put a tensor elsewhere: what is written here would then serve nobody."""
        if self.lookup is None:
            return
        places = [tensor.data_ptr() for tensor in self.lookup()]
        if places != [view.data_ptr() for view in self.tensors]:
            raise RuntimeError("the model's expert weights are no longer where they were at start-up")

    def slots(self, wanted: Iterable[int]) -> list[tuple[torch.Tensor, ...]]:
        """For each of the local slots ``wanted``: uint8 [bytes] of each tensor."""
        return by_slot(self.tensors, wanted)

    @property
    def bytes_per_expert(self) -> int:
        return sum(tensor.shape[1] for tensor in self.tensors)

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        """Start and end in a staging row, for each tensor."""
        out, start = [], 0
        for tensor in self.tensors:
            out.append((start, start + tensor.shape[1]))
            start += -(-tensor.shape[1] // ALIGNMENT) * ALIGNMENT
        return tuple(out)

    @property
    def row_bytes(self) -> int:
        return sum(-(-tensor.shape[1] // ALIGNMENT) * ALIGNMENT for tensor in self.tensors)


class StagingBuffer:
    """Room for the arrivals of one layer: uint8 [rows, bytes], allocated once.

    ``released``: CUDA event after which the last commit from this buffer has read it, None on a CPU.
    """

    def __init__(self, rows: int, row_bytes: int, device: torch.device | str) -> None:
        self.rows = torch.empty(rows, row_bytes, dtype=torch.uint8, device=device)
        self.released: Any = None

    @property
    def nbytes(self) -> int:
        return self.rows.numel()

    def columns(self, weights: LayerWeights) -> list[torch.Tensor]:
        """uint8 [rows, bytes] for each tensor of ``weights``: where its part of the arrivals lands."""
        return [self.rows[:, start:end] for start, end in weights.columns]

    def parts(self, weights: LayerWeights, wanted: Iterable[int]) -> list[tuple[torch.Tensor, ...]]:
        """For each of the rows ``wanted``, where one expert lands: uint8 [bytes] for each tensor of ``weights``."""
        return by_slot(self.columns(weights), wanted)


def staging_row_bytes(weights: Mapping[int, LayerWeights]) -> int:
    return max((layer.row_bytes for layer in weights.values()), default=0)


def by_slot(tensors: Sequence[torch.Tensor], wanted: Iterable[int]) -> list[tuple[torch.Tensor, ...]]:
    """For each index ``wanted``: the views of that slot in all ``tensors`` [slots, ...].

    Nothing but the index per view: background threads share the interpreter lock with the forward passes.
    """
    return [tuple(tensor[slot] for tensor in tensors) for slot in wanted]


def widest(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [..., bytes] seen as the widest integers that its sizes and addresses allow: fewer, larger copies."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        places = (tensor.shape[-1], tensor.data_ptr(), tensor.storage_offset(), *tensor.stride()[:-1])
        if not any(place % dtype.itemsize for place in places):
            return tensor.view(dtype)
    return tensor
