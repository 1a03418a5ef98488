"""The ``affinity`` entry that this package adds to SGLang's recorder dumps: its one writer and its one reader."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.content import array_of
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingWindow, check_distinct, estimated_coactivation

VERSION = 1
KEY = "affinity"
_ARRAYS = {
    "coactivation": np.int64, "tokens": np.int16, "phase_counts": np.int64, "token_phase": np.int8,
}  # fmt: skip


def window_to_dump(window: RoutingWindow) -> dict[str, Any]:
    """The ``affinity`` entry of a recorder dump: plain tensors, readable with ``torch.load(weights_only=True)``."""
    import torch

    assert window.tokens is not None
    entry: dict[str, Any] = {
        "version": VERSION,
        "counts": torch.from_numpy(window.counts),
        "coactivation": torch.from_numpy(estimated_coactivation(window.counts, window.tokens)),
        "tokens": torch.from_numpy(window.tokens),
    }
    if window.phase_counts is not None and window.token_phase is not None:
        entry["phase_counts"] = torch.from_numpy(window.phase_counts)
        entry["token_phase"] = torch.from_numpy(window.token_phase)
    return entry


def window_of_dump(data: Any, source: str = "dump") -> RoutingWindow:
    """The window that :func:`window_to_dump` wrote; raises InputError that begins with ``source``."""
    if not isinstance(data, dict) or data.get("version") != VERSION:
        version = data.get("version") if isinstance(data, dict) else None
        raise InputError(f"{source}: affinity entry of version {version}, but this package reads {VERSION}")
    counts = _integers(data, "counts", np.int64, source)
    if counts.ndim != 2:
        raise InputError(f"{source}: affinity counts have shape {counts.shape}, but must be [layers, experts]")
    rest = {
        name: None if data.get(name) is None else _integers(data, name, dtype, source)
        for name, dtype in _ARRAYS.items()
    }
    try:
        window = RoutingWindow(counts, **rest)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    if window.tokens is not None:
        check_distinct(window.tokens, f"{source}: affinity tokens", ("layer", "token"))
    return window


def _integers(data: dict[str, Any], name: str, dtype: type[np.integer[Any]], source: str) -> np.ndarray:
    array = array_of(data.get(name), source, f"affinity {name}")
    limits = np.iinfo(dtype)
    if array.dtype.kind not in "iu" or (array.size and (array.min() < limits.min or array.max() > limits.max)):
        raise InputError(f"{source}: affinity {name} is {array.dtype}, but must hold integers of {np.dtype(dtype)}")
    if name in ("counts", "coactivation", "phase_counts") and array.size and array.min() < 0:
        raise InputError(f"{source}: affinity {name} holds {array.min()}, but counts must be 0 or more")
    return np.ascontiguousarray(array, dtype=dtype)
