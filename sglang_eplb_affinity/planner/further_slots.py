"""Which slots besides the primaries small passes use: those that take the most off the busiest link of a GPU.

In a small pass of DeepEP's low-latency mode every (token, expert) is a copy of its own, and a GPU's dispatch and
combine take as long as the copies that it gets, those over the slow link longest. A second active slot of an expert
takes copies from the first, and where it is on another node, from the slow link (dispatch/primaries.py says what it
costs).

Chosen so that the sum of squares of what each GPU gets is small, a copy from another node counting ``node_weight``
ones of the own node: each GPU in turn takes the slot that is best as the others are, until none would take another.
Weights of 2, 4 and 8 differ by up to 0.6 % of a step on 32 GPUs and by up to 2.3 % on 64, where 2 is best (simulated,
DeepSeek-V3 with 256 redundant experts, 8 to 32 requests a GPU).
"""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.dispatch.numba_rules import deal_expert
from sglang_eplb_affinity.dispatch.primaries import primaries_of
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.domain.topology import Topology

_ROUNDS = 20  # at most; each lowers the sum


def further_slots_of(
    row: np.ndarray, primary: np.ndarray, counts: np.ndarray, topology: Topology, further_slots: int, node_weight: int
) -> np.ndarray:
    """int64 [gpus, further_slots]: the slots of each GPU, rising. Every GPU must have so many besides its primaries.

    ``row`` int32 [slots]; ``primary`` [experts]: primary slots; ``counts`` [experts]: tokens, which come from all GPUs
    alike.
    """
    one = ExpertMap(row[None], len(counts))
    active = np.zeros(len(row), np.bool_)
    active[primary] = True
    chosen = _choose(
        row.astype(np.int32), one.logical_to_all_physical()[0], one.replica_counts()[0], active,
        counts.astype(np.float64), topology.num_gpus, topology.slots_per_gpu(len(row)), topology.gpus_per_node,
        further_slots, node_weight,
    )  # fmt: skip
    return np.sort(chosen, axis=1)


def with_further_first(
    row: np.ndarray, counts: np.ndarray, topology: Topology, further_slots: int, node_weight: int
) -> np.ndarray:
    """``row`` int32 [slots] with each GPU's further slots in front of its other ones; primaries stay where they are.

    The order stays where there are no more of them anyway, and where a GPU's share of the experts is no whole number,
    so that GPUs with more primaries have fewer others.
    """
    per_gpu = topology.slots_per_gpu(len(row))
    primary = primaries_of(ExpertMap(row[None], len(counts)).logical_to_all_physical(), topology, len(row))[0]
    others = np.ones(len(row), bool)
    others[primary] = False
    each = others.reshape(topology.num_gpus, per_gpu).sum(1)
    if not 0 < further_slots < each.min() or each.min() < each.max():
        return row
    chosen = further_slots_of(row, primary, counts, topology, further_slots, node_weight)
    out = row.copy()
    for gpu, first in enumerate(chosen):
        places = gpu * per_gpu + np.flatnonzero(others[gpu * per_gpu : (gpu + 1) * per_gpu])
        front = places[:further_slots]
        # Whoever is in front already stays; the others change places with those that are in front without right.
        out[np.setdiff1d(front, first)], out[np.setdiff1d(first, front)] = (
            row[np.setdiff1d(first, front)], row[np.setdiff1d(front, first)]
        )  # fmt: skip
    return out


@kernel
def _add(  # type: ignore[no-untyped-def]
    expert, sign, table, replicas, active, counts, num_gpus, slots_per_gpu, gpus_per_node, node_weight, load
):
    """Add to load float64 [gpus] what each gets of an expert's tokens, ``sign`` 1 or -1."""
    slots = np.empty(replicas[expert], np.int32)
    dealt = np.empty(num_gpus, np.int32)
    count = 0
    for i in range(replicas[expert]):
        if active[table[expert, i]]:
            slots[count] = table[expert, i]
            count += 1
    deal_expert(expert, slots, count, num_gpus, slots_per_gpu, gpus_per_node, dealt)
    for source in range(num_gpus):
        gpu = dealt[source] // slots_per_gpu
        cost = 1.0 if gpu // gpus_per_node == source // gpus_per_node else float(node_weight)
        load[gpu] += sign * cost * counts[expert]


@kernel
def _switch(  # type: ignore[no-untyped-def]
    slot, on, slot_expert, table, replicas, active, counts, num_gpus, slots_per_gpu, gpus_per_node, node_weight, load
):
    """Make a slot active, or no longer, and load what the GPUs then get."""
    e = slot_expert[slot]
    _add(e, -1.0, table, replicas, active, counts, num_gpus, slots_per_gpu, gpus_per_node, node_weight, load)
    active[slot] = on
    _add(e, 1.0, table, replicas, active, counts, num_gpus, slots_per_gpu, gpus_per_node, node_weight, load)


@kernel
def _choose(  # type: ignore[no-untyped-def]
    slot_expert, table, replicas, active, counts, num_gpus, slots_per_gpu, gpus_per_node, further_slots, node_weight
):
    """int64 [gpus, further_slots]. slot_expert int32 [slots]; table int32 [experts, max_replicas]; replicas int32
    [experts]; active bool [slots], the primaries; counts float64 [experts]."""
    chosen = np.full((num_gpus, further_slots), -1, np.int64)
    load, trial = np.zeros(num_gpus), np.empty(num_gpus)
    of_map = (slot_expert, table, replicas, active, counts, num_gpus, slots_per_gpu, gpus_per_node, node_weight)
    for e in range(counts.shape[0]):
        _add(e, 1.0, *of_map[1:], load)
    for _ in range(_ROUNDS):
        changed = False
        for place in range(further_slots):
            for gpu in range(num_gpus):
                old = chosen[gpu, place]
                if old >= 0:
                    _switch(old, False, *of_map, load)
                best, least = -1, np.inf
                for slot in range(gpu * slots_per_gpu, (gpu + 1) * slots_per_gpu):
                    if active[slot]:
                        continue
                    trial[:] = load
                    _switch(slot, True, *of_map, trial)
                    active[slot] = False
                    squares = (trial * trial).sum()
                    # Rounding must not make two equal ones change places for ever.
                    if squares < least * (1 - 1e-12) or (slot == old and squares <= least * (1 + 1e-12)):
                        best, least = slot, squares
                changed |= best != old
                chosen[gpu, place] = best
                _switch(best, True, *of_map, load)
        if not changed:
            break
    return chosen
