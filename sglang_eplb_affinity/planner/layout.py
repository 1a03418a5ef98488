"""Tidying one layer's slots: no expert twice on a GPU, and as many experts as possible where they are already."""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.domain.topology import Topology


def without_duplicates(row: np.ndarray, counts: np.ndarray, topology: Topology) -> np.ndarray:
    """``row`` int32 [slots] with no expert twice on a GPU: slots are swapped, or take an expert that gains by it.

    counts int64 [experts]. More replicas of an expert than GPUs are of no use; EPLB makes them where slots are many.
    """
    out = row.copy()
    replicas = np.bincount(out, minlength=len(counts))
    _part_duplicates(out, len(out) // topology.num_gpus, counts // np.maximum(replicas, 1))
    return out


@kernel
def _part_duplicates(slot_expert, slots_per_gpu, item_load):  # type: ignore[no-untyped-def]
    """In place: each time the swap that shifts the least load, else the hottest expert that the GPU does not hold.

    slot_expert int32 [slots]; item_load int64 [experts], the load of one replica.
    """
    slots = slot_expert.shape[0]
    gpus = slots // slots_per_gpu
    holds = np.zeros((item_load.shape[0], gpus), np.int64)
    for s in range(slots):
        holds[slot_expert[s], s // slots_per_gpu] += 1
    for s in range(slots):
        g = s // slots_per_gpu
        a = slot_expert[s]
        if holds[a, g] < 2:
            continue
        best = -1
        best_shift = np.int64(0)
        for r in range(slots):
            h = r // slots_per_gpu
            b = slot_expert[r]
            if h == g or holds[a, h] > 0 or holds[b, g] > 0:
                continue
            shift = abs(item_load[a] - item_load[b])
            if best < 0 or shift < best_shift:
                best = r
                best_shift = shift
        holds[a, g] -= 1
        if best < 0:
            for e in range(item_load.shape[0]):
                if holds[e, g] == 0 and (best < 0 or item_load[e] > item_load[best]):
                    best = e
            holds[best, g] += 1
            slot_expert[s] = best
            continue
        b = slot_expert[best]
        h = best // slots_per_gpu
        slot_expert[s] = b
        slot_expert[best] = a
        holds[a, h] += 1
        holds[b, h] -= 1
        holds[b, g] += 1


@kernel
def _match(score):  # type: ignore[no-untyped-def]
    """Greedy matching: int64 [n], the column of each row; the largest score first, lower indices on ties."""
    n = score.shape[0]
    column = np.full(n, -1, np.int64)
    taken = np.zeros(n, np.uint8)
    for _ in range(n):
        best = np.int64(-1)
        row = -1
        col = -1
        for i in range(n):
            if column[i] >= 0:
                continue
            for j in range(n):
                if taken[j] == 0 and score[i, j] > best:
                    best = score[i, j]
                    row = i
                    col = j
        column[row] = col
        taken[col] = 1
    return column


@kernel
def align(new, current, slots_per_gpu, gpus_per_node):  # type: ignore[no-untyped-def]
    """``new`` int32 [slots] with nodes, GPUs of a node, and slots of a GPU renumbered to agree most with ``current``.

    GPUs of a node are interchangeable, and so are nodes; traffic and load do not change.
    """
    slots = new.shape[0]
    gpus = slots // slots_per_gpu
    nodes = gpus // gpus_per_node
    overlap = np.zeros((gpus, gpus), np.int64)
    for g in range(gpus):
        for h in range(gpus):
            for i in range(slots_per_gpu):
                for j in range(slots_per_gpu):
                    if new[g * slots_per_gpu + i] == current[h * slots_per_gpu + j]:
                        overlap[g, h] += 1
    node_score = np.zeros((nodes, nodes), np.int64)
    for m in range(nodes):
        for n in range(nodes):
            block = overlap[m * gpus_per_node : (m + 1) * gpus_per_node, n * gpus_per_node : (n + 1) * gpus_per_node]
            column = _match(block)
            for i in range(gpus_per_node):
                node_score[m, n] += block[i, column[i]]
    node_to = _match(node_score)
    out = np.empty_like(new)
    for m in range(nodes):
        n = node_to[m]
        block = overlap[m * gpus_per_node : (m + 1) * gpus_per_node, n * gpus_per_node : (n + 1) * gpus_per_node]
        column = _match(block)
        for i in range(gpus_per_node):
            source = (m * gpus_per_node + i) * slots_per_gpu
            target = (n * gpus_per_node + column[i]) * slots_per_gpu
            keep_slots(
                new[source : source + slots_per_gpu],
                current[target : target + slots_per_gpu],
                out[target : target + slots_per_gpu],
            )
    return out


@kernel
def keep_slots(new, current, out):  # type: ignore[no-untyped-def]
    """Order one GPU's experts: those that it holds already keep their slot, the others fill the rest."""
    used = np.zeros(new.shape[0], np.uint8)
    out[:] = -1
    for j in range(current.shape[0]):
        for i in range(new.shape[0]):
            if used[i] == 0 and new[i] == current[j]:
                out[j] = new[i]
                used[i] = 1
                break
    i = 0
    for j in range(current.shape[0]):
        if out[j] < 0:
            while used[i]:
                i += 1
            out[j] = new[i]
            used[i] = 1
