"""Ranks that are gone (SGLang's elastic EP): the others as a whole of their own, which is planned and judged as any."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology

GONE_SLOT = 0  # the expert in slots of ranks that are gone, as SGLang's `elasticity_aware` names it there


@dataclass(frozen=True)
class LivingRanks:
    """``alive`` bool [ranks] of ``launched``, the ranks that the server started with.

    A *living map* has the slots of living ranks only, in their order, and goes with :attr:`topology`. A *whole map* has
    all slots; those of ranks that are gone say ``GONE_SLOT`` and are in no replica table: an expert named there would
    be taken for a source of its weights at the next move. Raises InputError if nobody lives.
    """

    alive: np.ndarray
    launched: Topology

    def __post_init__(self) -> None:
        alive = np.asarray(self.alive, bool)
        if alive.shape != (self.launched.num_gpus,) or not alive.any():
            raise InputError(
                f"living ranks: a mask of shape {alive.shape} with {int(alive.sum())} alive, but must have "
                f"{self.launched.num_gpus} ranks and one alive"
            )
        object.__setattr__(self, "alive", alive)

    @property
    def ranks(self) -> np.ndarray:
        """int64 [living]: by their numbers in the server."""
        return np.flatnonzero(self.alive)

    @property
    def gone(self) -> tuple[int, ...]:
        return tuple(np.flatnonzero(~self.alive).tolist())

    @property
    def topology(self) -> Topology:
        """Of the living: nodes only where each that is left has as many ranks, as SGLang too then knows none."""
        of_nodes = self.alive.reshape(self.launched.num_nodes, -1).sum(1)
        left = of_nodes[of_nodes > 0]
        return Topology(int(self.alive.sum()), len(left) if (left == left[0]).all() else 1)

    def slots(self, num_slots: int) -> np.ndarray:
        """int64 [living slots]: where each slot of a living map is in a whole map of ``num_slots``."""
        return np.flatnonzero(np.repeat(self.alive, self.launched.slots_per_gpu(num_slots)))

    def of_map(self, whole: ExpertMap) -> ExpertMap:
        """The living map in ``whole``; raises InputError if it lacks an expert."""
        return ExpertMap(whole.physical_to_logical[:, self.slots(whole.num_slots)], whole.num_experts)

    def repaired(self, whole: np.ndarray, counts: np.ndarray) -> ExpertMap:
        """The living map in ``whole`` int32 [layers, slots], with every expert in it again; counts int64 [layers,
        experts].

        Experts that are lost, the hottest first, take slots of experts with other replicas, each where its GPU then
        carries least; nothing else moves. Raises InputError if living ranks have too few slots.
        """
        slots, experts = self.slots(whole.shape[1]), counts.shape[1]
        if len(slots) < experts:
            raise InputError(
                f"ranks {', '.join(map(str, self.gone))} are gone: the others have {len(slots)} slots, which cannot "
                f"hold {experts} experts"
            )
        rows = np.ascontiguousarray(whole[:, slots], np.int32)
        for row, of_layer in zip(rows, counts, strict=True):
            _refill(row, of_layer, self.topology.num_gpus)
        return ExpertMap(rows, experts)

    def whole_rows(self, living: ExpertMap) -> np.ndarray:
        """int32 [layers, slots]: ``living`` as a whole map."""
        num_slots = living.num_slots // self.topology.num_gpus * self.launched.num_gpus
        out = np.full((living.num_layers, num_slots), GONE_SLOT, np.int32)
        out[:, self.slots(num_slots)] = living.physical_to_logical
        return out

    def whole_slots(self, living: np.ndarray, num_slots: int) -> np.ndarray:
        """Slot numbers of a living map, -1 for none, as those of a whole map of ``num_slots``; any shape."""
        return np.where(living >= 0, self.slots(num_slots)[living], -1).astype(living.dtype)


def _refill(row: np.ndarray, counts: np.ndarray, num_gpus: int) -> None:
    """In place: lost experts into slots of replicated ones. In integers, so that all ranks choose alike."""
    replicas = np.bincount(row, minlength=len(counts))
    lost = np.flatnonzero(replicas == 0)
    gpu = np.arange(len(row)) // (len(row) // num_gpus)
    for expert in lost[np.argsort(-counts[lost], kind="stable")]:
        share = counts // np.maximum(replicas, 1)
        load = np.zeros(num_gpus, np.int64)
        np.add.at(load, gpu, share[row])
        donors = np.flatnonzero(replicas[row] > 1)
        slot = donors[np.argmin(load[gpu[donors]] - share[row[donors]])]
        replicas[row[slot]] -= 1
        replicas[expert] += 1
        row[slot] = expert
