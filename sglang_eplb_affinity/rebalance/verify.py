"""Proof that every slot holds the expert that the map says: checksums of all experts, taken before the first round.

For tests and for a first run on new hardware (environment variable EPLB_AFFINITY_VERIFY=1): each check reads all expert
weights of the rank and waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.rebalance.weights import LayerWeights, widest

logger = logging.getLogger(__name__)
ENVIRONMENT = "EPLB_AFFINITY_VERIFY"
WRONG = "holds wrong weights"  # in the log line of a rank that found some


class WeightVerifier:
    """A collective call of all ranks of ``group``; ``rank`` is the expert-parallel rank, ``replica`` which set of the
    experts it belongs to (ranks of different sets hold different shards)."""

    def __init__(
        self,
        weights: Mapping[int, LayerWeights],
        start: ExpertMap,
        rank: int,
        num_ranks: int,
        replica: tuple[int, ...],
        group: dist.ProcessGroup | None,
    ) -> None:
        self._weights, self._rank, self._local = weights, rank, start.num_slots // num_ranks
        own = self._slots(start)
        everyones: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyones, (replica, own), group=group)
        # Dummy weights of an expert's replicas differ: any of them is that expert's.
        self._expected: dict[tuple[int, int], set[tuple[int, ...]]] = {}
        for of, checksums in everyones:
            for layer, expert, value in checksums if of == replica else ():
                self._expected.setdefault((layer, expert), set()).add(value)

    def check(self, in_force: ExpertMap) -> int:
        """Slots of this rank that hold something else; each layer that has any is logged."""
        wrong = [
            (layer, expert)
            for layer, expert, value in self._slots(in_force)
            if value not in self._expected[layer, expert]
        ]
        if wrong:
            logger.error("[eplb-affinity] verify: rank %d %s for (layer, expert) %s", self._rank, WRONG, wrong)
        else:
            logger.info("[eplb-affinity] verify: all %d layers hold what the map says", len(self._weights))
        return len(wrong)

    def _slots(self, expert_map: ExpertMap) -> list[tuple[int, int, tuple[int, ...]]]:
        found = []
        for layer, weights in self._weights.items():
            sums = np.stack([_checksums(tensor) for tensor in weights.tensors], 1)
            experts = expert_map.physical_to_logical[layer].reshape(-1, self._local)[self._rank]
            found += [(layer, int(expert), tuple(row.tolist())) for expert, row in zip(experts, sums, strict=True)]
        return found


def _checksums(tensor: torch.Tensor) -> np.ndarray:
    """int64 [slots] of a uint8 [slots, bytes] tensor; sums of integers, which wrap around alike everywhere."""
    sums = []
    for slot in tensor:
        words = widest(slot).to(torch.int64)
        # Position counts too, so that exchanged halves show.
        sums.append((words * torch.arange(1, len(words) + 1, device=words.device)).sum())
    return np.asarray(torch.stack(sums).cpu().numpy())
