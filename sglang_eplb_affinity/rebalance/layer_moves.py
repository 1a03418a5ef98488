"""Which slots of a layer change, where their weights come from, and the replica tables that follow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.dispatch.numba_rules import static_slots
from sglang_eplb_affinity.dispatch.primaries import active_replicas
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology

KEEPS = -1


@dataclass(frozen=True)
class LayerPlan:
    """One layer's change, the same bytes on every rank.

    ``slots`` int32 [slots]: the expert of each slot afterwards. ``source`` int32 [slots]: the slot whose weights it
    takes, as they are before the change; -1 where the slot keeps its own. ``replicas`` int32 [experts, max_replicas]:
    slots of each expert in rising order, padded with -1. ``static_choice`` int32 [ranks, experts]: the slot that each
    rank sends an expert's tokens to under SGLang's ``static`` dispatch; under ``primary`` [ranks, 2 * experts], see
    :func:`rank_table`; None under other rules.
    """

    layer: int
    slots: np.ndarray
    source: np.ndarray
    replicas: np.ndarray
    static_choice: np.ndarray | None = None


@dataclass(frozen=True)
class Arrival:
    """Local slot ``slot`` of this rank takes the weights of local slot ``source_slot`` of rank ``source_rank``."""

    slot: int
    source_rank: int
    source_slot: int


@dataclass(frozen=True)
class Departure:
    """Rank ``target_rank`` needs local slot ``slot`` of this rank, for its own local slot ``target_slot``."""

    slot: int
    target_rank: int
    target_slot: int


@dataclass(frozen=True)
class LayerJob:
    """What one rank does to stage a layer: arrivals and departures in the order of the slots that change."""

    layer: int
    arrivals: tuple[Arrival, ...]
    departures: tuple[Departure, ...]


def layer_plan(
    layer: int, old: np.ndarray, new: np.ndarray, num_experts: int, topology: Topology, rule: DispatchRule,
    further_slots: int = 0,
) -> LayerPlan:  # fmt: skip
    """From the slots before and after, int32 [slots] each."""
    one = ExpertMap(new[None], num_experts)
    replicas = one.logical_to_all_physical()[0]
    table = rank_table(replicas, topology, len(new), rule, further_slots)
    return LayerPlan(layer, new.astype(np.int32), choose_sources(old, new, topology), replicas, table)


def choose_sources(old: np.ndarray, new: np.ndarray, topology: Topology) -> np.ndarray:
    """int32 [slots]: where each changed slot takes its expert's weights from, -1 for slots that keep theirs.

    A replica on the same GPU first, else one on the same node, else any; of several the one that has been asked for
    least so far, so that a hot expert's new replicas do not all pull from one GPU. Lower slots win ties.
    """
    slots_per_gpu = topology.slots_per_gpu(len(old))
    gpu = np.arange(len(old)) // slots_per_gpu
    node = gpu // topology.gpus_per_node
    asked = np.zeros(len(old), np.int64)
    source = np.full(len(old), KEEPS, np.int32)
    for slot in np.flatnonzero(old != new):
        holders = np.flatnonzero(old == new[slot])
        distance = np.where(gpu[holders] == gpu[slot], 0, np.where(node[holders] == node[slot], 1, 2))
        nearest = holders[distance == distance.min()]
        chosen = nearest[np.argmin(asked[nearest])]
        asked[chosen] += 1
        source[slot] = chosen
    return source


def static_choice(replicas: np.ndarray, topology: Topology, num_slots: int) -> np.ndarray:
    """int32 [ranks, experts]: the ``static`` dispatch table of all ranks for one layer; see dispatch.py.

    ``replicas`` [experts, max_replicas]: slots in rising order, padded with -1.
    """
    table = np.ascontiguousarray(replicas, dtype=np.int32)
    count = (table >= 0).sum(1).astype(np.int32)
    slots_per_gpu = topology.slots_per_gpu(num_slots)
    return np.asarray(static_slots(table, count, topology.num_gpus, slots_per_gpu, topology.gpus_per_node))


def rank_table(
    replicas: np.ndarray, topology: Topology, num_slots: int, rule: DispatchRule, further_slots: int = 0
) -> np.ndarray | None:
    """int32 [ranks, columns]: what a rank looks up in one layer, or None. Under ``static`` the slot of each expert;
    under ``primary`` that among the active slots, for small passes, and behind them those of ``static``."""
    if rule not in ("static", "primary"):
        return None
    static = static_choice(replicas, topology, num_slots)
    if rule == "static":
        return static
    active = active_replicas(replicas[None], topology, num_slots, further_slots)[0]
    return np.concatenate([static_choice(active, topology, num_slots), static], axis=1)


def job_of(plan: LayerPlan, rank: int, slots_per_gpu: int) -> LayerJob:
    """This rank's part of a layer's change."""
    changed = np.flatnonzero(plan.source != KEEPS)
    target, source = changed // slots_per_gpu, plan.source[changed] // slots_per_gpu
    arrivals = tuple(
        Arrival(
            int(slot % slots_per_gpu), int(plan.source[slot] // slots_per_gpu), int(plan.source[slot] % slots_per_gpu)
        )
        for slot in changed[target == rank]
    )
    departures = tuple(
        Departure(int(plan.source[slot] % slots_per_gpu), int(slot // slots_per_gpu), int(slot % slots_per_gpu))
        for slot in changed[(source == rank) & (target != rank)]
    )
    return LayerJob(plan.layer, arrivals, departures)
