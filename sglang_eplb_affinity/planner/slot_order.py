"""The order of a GPU's slots in a plan for ``primary``: primaries in front, behind them the further slots.

An order is not what a move of experts is for, but where only so many slots of a GPU may change in a round (those that
there is memory to stage), it must not keep a layer's move from happening either.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.even_primaries import primaries_first
from sglang_eplb_affinity.planner.further_slots import with_further_first


def in_order(
    slots: np.ndarray, counts: np.ndarray, topology: Topology, config: PlannerConfig, current: np.ndarray | None
) -> np.ndarray:
    """``slots`` int32 [slots] in the best order that changes at most ``config.max_changes`` slots of each GPU of
    ``current``; as they are where none does. counts int64 [experts]."""
    if not config.even_primaries:
        return slots
    for ordered in _orders(slots, counts, topology, config, current):
        if current is None or config.max_changes is None:
            return ordered
        if (ordered != current).reshape(topology.num_gpus, -1).sum(1).max() <= config.max_changes:
            return ordered
    return slots


def _orders(
    slots: np.ndarray, counts: np.ndarray, topology: Topology, config: PlannerConfig, current: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Best first; the last one has as many primaries on each GPU, and no more."""
    even = primaries_first(slots, counts, topology, current)
    if config.further_slots:
        yield with_further_first(even, counts, topology, config.further_slots, config.node_weight)
    yield even
    yield primaries_first(slots, counts, topology, current, even_load=False)
