"""Keep experts that stay on their GPU in their slot, so that a new map moves no weights for nothing."""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.expert_map import ExpertMap
from sglang_eplb_affinity.topology import Topology


def align_slots(old: ExpertMap, new: ExpertMap, topology: Topology) -> ExpertMap:
    """``new`` with the slots of each GPU reordered: an expert that ``old`` has on the same GPU keeps its slot.

    Which GPU holds which experts is unchanged. Raises ValueError if the maps have different shapes.
    """
    if old.physical_to_logical.shape != new.physical_to_logical.shape:
        raise ValueError(f"maps of shape {old.physical_to_logical.shape} and {new.physical_to_logical.shape}")
    per_gpu = topology.slots_per_gpu(new.num_slots)
    before = old.physical_to_logical.reshape(-1, per_gpu)
    after = new.physical_to_logical.reshape(-1, per_gpu).copy()
    for row in np.flatnonzero((before != after).any(axis=1)):
        after[row] = _aligned(before[row].tolist(), after[row].tolist())
    return ExpertMap(after.reshape(new.physical_to_logical.shape), new.num_experts)


def _aligned(before: list[int], after: list[int]) -> list[int]:
    placed: list[int | None] = [None] * len(after)
    left = list(after)
    for slot, expert in enumerate(before):
        if expert in left:
            placed[slot] = expert
            left.remove(expert)
    return [expert if expert is not None else left.pop(0) for expert in placed]
