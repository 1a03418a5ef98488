"""One rank works something out for all, which must agree whatever fails on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_FAILED, _FOUND, _NOTHING = 0, 1, 2


@dataclass(frozen=True)
class Answer:
    """``rows`` int32, or None where the one rank found none or failed; ``error`` on that rank only."""

    rows: np.ndarray | None = None
    failed: bool = False
    error: Exception | None = None


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def from_one_rank(find: Callable[[], np.ndarray | None], shape: tuple[int, ...], device: Any, rank: int = 0) -> Answer:
    """A collective call: what ``find`` returns on ``rank``, an integer array of ``shape`` or None; it never raises."""
    message = torch.zeros(int(np.prod(shape)) + 1, dtype=torch.int64)
    error: Exception | None = None
    if this_rank() == rank:
        try:
            rows = find()
            message[0] = _NOTHING if rows is None else _FOUND
            if rows is not None:
                message[1:] = torch.from_numpy(rows.astype(np.int64).ravel())
        except Exception as failure:  # the other ranks wait for the broadcast
            message[0], error = _FAILED, failure
    if dist.is_initialized():
        on_device = message.to(device)
        dist.broadcast(on_device, src=rank)
        message = on_device.cpu()
    if message[0] != _FOUND:
        return Answer(failed=bool(message[0] == _FAILED), error=error)
    return Answer(message[1:].numpy().reshape(shape).astype(np.int32))
