"""The ``affinity`` entry of a recorder dump."""

from __future__ import annotations

from typing import Any

import torch

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingWindow, estimated_coactivation

DUMP_VERSION = 1


def window_to_dump(window: RoutingWindow) -> dict[str, Any]:
    """The ``affinity`` entry of a recorder dump: plain tensors, readable with ``torch.load(weights_only=True)``."""
    assert window.tokens is not None
    entry: dict[str, Any] = {
        "version": DUMP_VERSION,
        "counts": torch.from_numpy(window.counts),
        "coactivation": torch.from_numpy(estimated_coactivation(window.counts, window.tokens)),
        "tokens": torch.from_numpy(window.tokens),
    }
    if window.phase_counts is not None and window.token_phase is not None:
        entry["phase_counts"] = torch.from_numpy(window.phase_counts)
        entry["token_phase"] = torch.from_numpy(window.token_phase)
    return entry


def window_of_dump(data: dict[str, Any]) -> RoutingWindow:
    """The window that :func:`window_to_dump` wrote; raises InputError if the entry is of another version."""
    if data.get("version") != DUMP_VERSION:
        raise InputError(
            f"dump: affinity entry of version {data.get('version')}, but this package reads {DUMP_VERSION}"
        )
    names = ("coactivation", "tokens", "phase_counts", "token_phase")
    rest = (None if data.get(name) is None else data[name].cpu().numpy() for name in names)
    return RoutingWindow(data["counts"].cpu().numpy(), *rest)
