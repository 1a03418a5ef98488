"""Changing which experts have replicas, slot by slot, until no GPU is loaded over the cap: for incremental plans.

A slot whose expert has further replicas takes an expert of the most loaded GPU instead (or, on that GPU, the coldest
expert), always the pair that lowers the squared overload most. One such step costs one move. Loads are judged with
even spreading over replicas, as EPLB does.
"""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.numba_kernel import kernel

HOTTEST = 3  # experts of the most loaded GPU that are tried in each step


@kernel
def _locate_replicas(slot_expert, slots_per_gpu, home, replica_gpus, replicas, new_here):  # type: ignore[no-untyped-def]
    """Fill in each expert's GPUs and their number, and how many experts of each GPU are new to it (all 0 before)."""
    for s in range(slot_expert.shape[0]):
        e = slot_expert[s]
        g = s // slots_per_gpu
        replica_gpus[e, replicas[e]] = g
        replicas[e] += 1
        new_here[g] += 1 - home[e, g]


@kernel
def _shift_load(load, replica_gpus, replicas, counts, e, sign):  # type: ignore[no-untyped-def]
    """Add (sign 1) or take away (-1) what expert e puts on its GPUs."""
    share = counts[e] // replicas[e]
    for i in range(replicas[e]):
        load[replica_gpus[e, i]] += sign * share


@kernel
def _retarget(replica_gpus, replicas, a, b, g):  # type: ignore[no-untyped-def]
    """One slot of GPU g turns from expert a to expert b."""
    last = replicas[a] - 1
    for i in range(replicas[a]):
        if replica_gpus[a, i] == g:
            replica_gpus[a, i] = replica_gpus[a, last]
            break
    replicas[a] -= 1
    replica_gpus[b, replicas[b]] = g
    replicas[b] += 1


@kernel
def _candidates(slot_expert, counts, replicas, slots_per_gpu, top, hot, cold):  # type: ignore[no-untyped-def]
    """Experts that a slot may take: the hottest of GPU ``top`` (on other GPUs), the coldest other (on its own)."""
    hot[:] = -1
    for s in range(top * slots_per_gpu, (top + 1) * slots_per_gpu):
        e = slot_expert[s]
        for i in range(hot.shape[0]):
            if hot[i] < 0 or counts[e] * replicas[hot[i]] > counts[hot[i]] * replicas[e]:
                hot[i + 1 :] = hot[i:-1].copy()
                hot[i] = e
                break
    cold[0] = -1
    for e in range(counts.shape[0]):
        here = False
        for s in range(top * slots_per_gpu, (top + 1) * slots_per_gpu):
            here = here or slot_expert[s] == e
        if not here and (cold[0] < 0 or counts[e] * (replicas[cold[0]] + 1) < counts[cold[0]] * (replicas[e] + 1)):
            cold[0] = e


@kernel
def adapt_replicas(slot_expert, counts, slots_per_gpu, load_cap, home, max_moves):  # type: ignore[no-untyped-def]
    """Change ``slot_expert`` int32 [slots] in place; returns the number of slots that hold another expert.

    counts int64 [experts]; load_cap in counts; home uint8 [experts, gpus]: 1 where an expert is in the current map. No
    GPU gets more than ``max_moves`` experts that are new to it, no expert loses its last replica, and no GPU gets an
    expert twice.
    """
    slots = slot_expert.shape[0]
    experts = counts.shape[0]
    gpus = slots // slots_per_gpu
    replicas = np.zeros(experts, np.int64)
    replica_gpus = np.zeros((experts, slots), np.int64)
    holds = np.zeros((experts, gpus), np.int64)
    new_here = np.zeros(gpus, np.int64)
    _locate_replicas(slot_expert, slots_per_gpu, home, replica_gpus, replicas, new_here)
    for s in range(slots):
        holds[slot_expert[s], s // slots_per_gpu] += 1
    load = np.zeros(gpus, np.int64)
    for e in range(experts):
        _shift_load(load, replica_gpus, replicas, counts, e, 1)
    mean = load.sum() / gpus
    changed = 0
    hot = np.empty(HOTTEST, np.int64)
    cold = np.empty(1, np.int64)
    for _ in range(slots):
        top = np.argmax(load)
        if load[top] <= load_cap:
            break
        overload = 0.0
        for g in range(gpus):
            overload += max(load[g] - mean, 0.0) ** 2
        best = overload
        highest = load[top]
        best_slot = -1
        best_expert = -1
        _candidates(slot_expert, counts, replicas, slots_per_gpu, top, hot, cold)
        for s in range(slots):
            a = slot_expert[s]
            g = s // slots_per_gpu
            if replicas[a] < 2:
                continue
            for b in cold if g == top else hot:
                if b < 0 or holds[b, g] > 0:
                    continue
                new = new_here[g] - (1 - home[a, g]) + (1 - home[b, g])
                if new > max_moves and new > new_here[g]:
                    continue
                _shift_load(load, replica_gpus, replicas, counts, a, -1)
                _shift_load(load, replica_gpus, replicas, counts, b, -1)
                _retarget(replica_gpus, replicas, a, b, g)
                _shift_load(load, replica_gpus, replicas, counts, a, 1)
                _shift_load(load, replica_gpus, replicas, counts, b, 1)
                trial = 0.0
                for h in range(gpus):
                    trial += max(load[h] - mean, 0.0) ** 2
                if trial < best and load.max() <= highest:
                    best = trial
                    best_slot = s
                    best_expert = b
                _shift_load(load, replica_gpus, replicas, counts, a, -1)
                _shift_load(load, replica_gpus, replicas, counts, b, -1)
                _retarget(replica_gpus, replicas, b, a, g)
                _shift_load(load, replica_gpus, replicas, counts, a, 1)
                _shift_load(load, replica_gpus, replicas, counts, b, 1)
        if best_slot < 0:
            break
        a = slot_expert[best_slot]
        g = best_slot // slots_per_gpu
        _shift_load(load, replica_gpus, replicas, counts, a, -1)
        _shift_load(load, replica_gpus, replicas, counts, best_expert, -1)
        _retarget(replica_gpus, replicas, a, best_expert, g)
        _shift_load(load, replica_gpus, replicas, counts, a, 1)
        _shift_load(load, replica_gpus, replicas, counts, best_expert, 1)
        new_here[g] += home[a, g] - np.int64(home[best_expert, g])
        holds[a, g] -= 1
        holds[best_expert, g] += 1
        slot_expert[best_slot] = best_expert
        changed += 1
    return changed
