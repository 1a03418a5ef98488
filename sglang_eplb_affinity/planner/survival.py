"""Maps that survive the loss of a rank or of a node: every expert on two of them, where the slots allow."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sglang_eplb_affinity.domain.topology import Topology

Survive = Literal["none", "rank", "node"]
SURVIVE: tuple[Survive, ...] = ("none", "rank", "node")


def unit_gpus(survive: Survive, topology: Topology) -> int:
    """GPUs of what may be lost: 1 for a rank, those of a node for a node; 0 for ``none``."""
    return {"none": 0, "rank": 1, "node": topology.gpus_per_node}[survive]


def units_of(row: np.ndarray, num_experts: int, topology: Topology, gpus: int) -> np.ndarray:
    """int64 [experts, units]: replicas of each expert on each unit of ``gpus`` GPUs; row int32 [slots]."""
    out = np.zeros((num_experts, topology.num_gpus // gpus), np.int64)
    np.add.at(out, (row, np.arange(len(row)) // (len(row) // topology.num_gpus * gpus)), 1)
    return out


def uncovered(row: np.ndarray, counts: np.ndarray, topology: Topology, survive: Survive) -> np.ndarray:
    """bool [experts]: lost with one rank (node), since all replicas are on it."""
    gpus = unit_gpus(survive, topology)
    return np.asarray((units_of(row, len(counts), topology, gpus) > 0).sum(1) < 2)


def survives_better(
    planned: np.ndarray, current: np.ndarray, counts: np.ndarray, topology: Topology, survive: Survive
) -> bool:
    """Whether less traffic is lost with one rank (node) under ``planned`` than under ``current``, int32 [slots]."""
    if survive == "none":
        return False
    lost = [counts[uncovered(row, counts, topology, survive)].sum() for row in (planned, current)]
    return bool(lost[0] < lost[1])


def with_survivors(row: np.ndarray, counts: np.ndarray, topology: Topology, survive: Survive) -> np.ndarray:
    """``row`` int32 [slots] with every expert on two ranks (nodes), or as much traffic as the slots allow.

    The hottest expert on one unit takes, on another, the slot of an expert that can spare it: of those with a replica
    more than two units need the one whose load per replica is nearest; else of the coldest expert that is on two units
    and has less traffic. No GPU gets an expert twice. counts int64 [experts].
    """
    gpus = unit_gpus(survive, topology)
    out = row.copy()
    if not gpus or topology.num_gpus == gpus:
        return out
    slots_per_gpu = len(out) // topology.num_gpus
    gpu_of = np.arange(len(out)) // slots_per_gpu
    unit_of = gpu_of // gpus
    held = units_of(out, len(counts), topology, gpus)
    holds = units_of(out, len(counts), topology, 1) > 0
    hopeless: set[int] = set()
    while True:
        units = (held > 0).sum(1)
        open_experts = [e for e in np.argsort(-counts, kind="stable").tolist() if units[e] < 2 and e not in hopeless]
        if not open_experts:
            return out
        e = open_experts[0]
        free = (held[e, unit_of] == 0) & ~holds[e, gpu_of]
        here = held[out, unit_of]
        replicas = held.sum(1)
        spare = free & (replicas[out] > 1) & ((here > 1) | (units[out] > 2) | (units[out] < 2))
        swap = free & (units[out] == 2) & (here == 1) & (counts[out] < counts[e])
        if spare.any():
            distance = np.abs(counts[out] / replicas[out] - counts[e] / (replicas[e] + 1))
            slot = int(np.argmin(np.where(spare, distance, np.inf)))
        elif swap.any():
            slot = int(np.argmin(np.where(swap, counts[out], np.iinfo(np.int64).max)))
        else:
            hopeless.add(e)
            continue
        gone = int(out[slot])
        out[slot] = e
        for expert, step in ((gone, -1), (e, 1)):
            held[expert, unit_of[slot]] += step
            holds[expert, gpu_of[slot]] = step > 0
