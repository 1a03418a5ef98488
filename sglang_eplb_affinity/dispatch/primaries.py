"""The slots that small passes use: each expert's primary one, so that every expert's weights are read once, and where
that saves more than it costs a few of each GPU besides.

In a pass of few tokens a GPU's experts cost what reading the weights of its active slots costs, whatever the tokens
(docs/design.md). With one active slot an expert there are experts / GPUs of them on each GPU, if the map allows it.

It does not always. SGLang's start placement of 256 experts on 8 GPUs of 36 slots has the first 32 experts twice, on the
first and the last GPU, so the six GPUs between keep 36 experts of their own each and the other two share 40 (Hall's
theorem). So the numbers are those of an optimal semi-matching (Harvey, Ladner, Lovasz and Tamir, "Semi-matchings for
bipartite graphs and load balancing", 2006): no other choice has a smaller maximum, nor a smaller sum of any convex
function of the GPUs' numbers. On 2 GPUs with no expert twice on one GPU they are even: each GPU's experts without a
replica on the other are at most half of all.

Over several nodes a second active slot may save more on the slow link than its weights cost: ``further_slots`` of each
GPU are active too, and a pass goes by ``static`` among the active ones. 0 are the primaries alone, all of a GPU's are
``static``. How many is the time model's to say (simulate, recommend), which of them the planner's
(planner/further_slots.py).

A function of the map alone: ranks agree, and a map that is recorded or loaded brings its choice along. Of several
even choices a planner names one by the order of slots: where the first experts / GPUs slots of all GPUs hold every
expert once, they are the primaries (planner/even_primaries.py takes those that load the busiest GPU least), and the
further ones are those behind them.
"""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.domain.topology import Topology


@kernel
def even_choice(table, replicas, chosen, num_gpus, slots_per_gpu):  # type: ignore[no-untyped-def]
    """Change ``chosen`` int64 [experts], columns of ``table``, until no chain of moves from a GPU to one with at least
    two fewer is left, which is optimal (Harvey et al.)."""
    experts = table.shape[0]
    count = np.zeros(num_gpus, np.int64)
    for e in range(experts):
        count[table[e, chosen[e]] // slots_per_gpu] += 1
    came_from = np.empty(num_gpus, np.int64)
    by_expert = np.empty(num_gpus, np.int64)
    by_column = np.empty(num_gpus, np.int64)
    queue = np.empty(num_gpus, np.int64)
    improved = True
    while improved:
        improved = False
        for start in range(num_gpus):
            came_from[:] = -1
            came_from[start] = start
            queue[0] = start
            first, last = 0, 1
            end = -1
            while first < last and end < 0:
                gpu = queue[first]
                first += 1
                for e in range(experts):
                    if table[e, chosen[e]] // slots_per_gpu != gpu:
                        continue
                    for i in range(replicas[e]):
                        to = table[e, i] // slots_per_gpu
                        if came_from[to] >= 0:
                            continue
                        came_from[to], by_expert[to], by_column[to] = gpu, e, i
                        queue[last] = to
                        last += 1
                        if end < 0 and count[to] <= count[start] - 2:
                            end = to
            if end < 0:
                continue
            improved = True
            count[start] -= 1
            count[end] += 1
            while end != start:
                chosen[by_expert[end]] = by_column[end]
                end = came_from[end]


@kernel
def primary_slots(table, replicas, num_gpus, slots_per_gpu):  # type: ignore[no-untyped-def]
    """int32 [experts]: the primary slot of each.

    table int32 [experts, max_replicas], slots in rising order; replicas int32 [experts].
    """
    experts = table.shape[0]
    named = np.full(experts, -1, np.int32)
    found = 0
    for e in range(experts):
        for i in range(replicas[e]):
            if table[e, i] % slots_per_gpu * num_gpus < experts and named[e] < 0:
                named[e] = table[e, i]
                found += 1
    if found == experts and experts % num_gpus == 0:
        return named
    chosen = np.zeros(experts, np.int64)  # column of table
    count = np.zeros(num_gpus, np.int64)
    for fewest in range(1, table.shape[1] + 1):  # those with the fewest slots to choose from first
        for e in range(experts):
            if replicas[e] != fewest:
                continue
            best = 0
            for i in range(1, replicas[e]):
                if count[table[e, i] // slots_per_gpu] < count[table[e, best] // slots_per_gpu]:
                    best = i
            chosen[e] = best
            count[table[e, best] // slots_per_gpu] += 1
    even_choice(table, replicas, chosen, num_gpus, slots_per_gpu)
    out = np.empty(experts, np.int32)
    for e in range(experts):
        out[e] = table[e, chosen[e]]
    return out


def primaries_of(replicas: np.ndarray, topology: Topology, num_slots: int) -> np.ndarray:
    """int32 [layers, experts]: primary slots. ``replicas`` [layers, experts, max_replicas]: see ExpertMap."""
    table = np.ascontiguousarray(replicas, dtype=np.int32)
    count = (table >= 0).sum(2).astype(np.int32)
    slots_per_gpu = topology.slots_per_gpu(num_slots)
    of_layers = [primary_slots(table[n], count[n], topology.num_gpus, slots_per_gpu) for n in range(len(table))]
    return np.stack(of_layers) if of_layers else np.empty(table.shape[:2], np.int32)


def active_replicas(replicas: np.ndarray, topology: Topology, num_slots: int, further_slots: int = 0) -> np.ndarray:
    """int32, as ``replicas`` [layers, experts, max_replicas]: those that small passes use, in rising order, padded
    with -1. They are the primaries and on each GPU the first ``further_slots`` of its other slots."""
    slots_per_gpu = topology.slots_per_gpu(num_slots)
    primary = primaries_of(replicas, topology, num_slots)
    active = np.zeros((len(replicas), num_slots), bool)
    np.put_along_axis(active, primary, True, axis=1)
    others = ~active.reshape(len(replicas), topology.num_gpus, slots_per_gpu)
    active |= (others & (others.cumsum(2) <= further_slots)).reshape(active.shape)
    held = np.where(replicas >= 0, np.take_along_axis(active[:, None], np.maximum(replicas, 0), axis=2), False)
    order = np.argsort(~held, axis=2, kind="stable")
    return np.take_along_axis(np.where(held, replicas, -1), order, axis=2).astype(np.int32)


def over_share(primary: np.ndarray, topology: Topology, num_slots: int) -> int:
    """Experts beyond their GPU's share, experts / GPUs rounded up; 0: even. ``primary`` [experts]: primary slots."""
    has = np.bincount(primary // topology.slots_per_gpu(num_slots), minlength=topology.num_gpus)
    return int(np.maximum(has - -(-len(primary) // topology.num_gpus), 0).sum())


def uneven_layers(expert_map: ExpertMap, topology: Topology) -> np.ndarray:
    """int64: the layers of ``expert_map`` that allow no even choice."""
    of_layers = primaries_of(expert_map.logical_to_all_physical(), topology, expert_map.num_slots)
    return np.flatnonzero([over_share(primary, topology, expert_map.num_slots) for primary in of_layers])
