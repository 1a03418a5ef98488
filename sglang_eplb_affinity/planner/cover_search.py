"""Annealed search over which experts are replicated and where, for the dispatch rule ``cover``.

Two kinds of proposals: swap the contents of two slots of different GPUs; or turn one replica of an expert that has
several into a replica of another expert. Every proposal is evaluated exactly on the sample (cover_evaluation.py).
"""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.planner.cover_evaluation import evaluate_cover, locate_replicas, pin_gpu
from sglang_eplb_affinity.planner.imbalance import SHIFT
from sglang_eplb_affinity.planner.random_steps import next_random


@kernel
def _fill_profile(slot_expert, replicas, profile, slots_per_gpu, g, gpu_profile):  # type: ignore[no-untyped-def]
    """Recompute GPU g's load by block of time, an even share of each replicated expert."""
    row = gpu_profile[g]
    row[:] = 0
    for s in range(g * slots_per_gpu, (g + 1) * slots_per_gpu):
        e = slot_expert[s]
        part = np.int32(256 // replicas[e])
        source = profile[e]
        for c in range(row.shape[0]):
            row[c] += source[c] * part >> 8


@kernel
def _squares(gpu_profile):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for g in range(gpu_profile.shape[0]):
        for c in range(gpu_profile.shape[1]):
            total += np.int64(gpu_profile[g, c]) * gpu_profile[g, c]
    return total


@kernel
def _find(where, replicas, e, g):  # type: ignore[no-untyped-def]
    for i in range(replicas[e]):
        if where[e, i] == g:
            return i
    return -1


@kernel
def _retarget(where, replicas, e, g, h):  # type: ignore[no-untyped-def]
    """One replica of e moves from GPU g to h; the list stays sorted, so that equal states evaluate equally."""
    i = _find(where, replicas, e, g)
    where[e, i] = h
    while i > 0 and where[e, i - 1] > where[e, i]:
        where[e, i - 1], where[e, i] = where[e, i], where[e, i - 1]
        i -= 1
    while i + 1 < replicas[e] and where[e, i + 1] < where[e, i]:
        where[e, i + 1], where[e, i] = where[e, i], where[e, i + 1]
        i += 1


@kernel
def search_cover(slot_expert, sample, grid, costs, balance, moves, steps):  # type: ignore[no-untyped-def]
    """Improve ``slot_expert`` int32 [slots] in place; returns (proposed, accepted) int64.

    sample: TokenSets; grid, costs, balance, moves and steps: see search_arguments.py; ``moves.unit`` is not looked at.
    No GPU may hold an expert twice at the start.
    """
    bits, halves, members, item_load = sample
    slots_per_gpu, gpus_per_node, num_nodes = grid
    gpu_weight, node_weight, spread_weight, move_cost = costs
    load_cap, load_free, load_scale, profile, imbalance_weight = balance
    home, max_moves = moves.home, moves.most
    temperatures, neg_log, steps_per_stage, seed = steps
    slots = slot_expert.shape[0]
    experts, words = bits.shape
    gpus = slots // slots_per_gpu
    replicas = np.zeros(experts, np.int64)
    where = np.zeros((experts, gpus), np.int64)
    new_here = np.zeros(gpus, np.int64)
    locate_replicas(slot_expert, slots_per_gpu, home, where, replicas, new_here)
    pinned = np.zeros((gpus, words), np.uint64)
    pinned_load = np.zeros(gpus, np.int64)
    for g in range(gpus):
        pin_gpu(slot_expert, replicas, bits, item_load, slots_per_gpu, g, pinned, pinned_load)
    visited = np.empty((gpus, words), np.uint64)
    node_visited = np.empty((num_nodes, words), np.uint64)
    load = np.empty(gpus, np.int64)
    work = np.empty(words, np.uint64)
    saved = np.empty((3, words), np.uint64)
    saved_load = np.empty(3, np.int64)
    touched = np.empty(3, np.int64)
    cost, excess = evaluate_cover(
        replicas, where, bits, halves, members, item_load, gpus_per_node, num_nodes, gpu_weight, node_weight,
        spread_weight, pinned, pinned_load, load_cap, load_free, load_scale, imbalance_weight, visited, node_visited,
        load, work,
    )  # fmt: skip
    gpu_profile = np.zeros((gpus, profile.shape[1]), np.int32)
    saved_profile = np.zeros_like(gpu_profile)
    for g in range(gpus):
        cost += move_cost * new_here[g]
        _fill_profile(slot_expert, replicas, profile, slots_per_gpu, g, gpu_profile)
    cost += _squares(gpu_profile) * imbalance_weight >> SHIFT
    best = slot_expert.copy()
    best_cost = cost
    best_excess = excess
    state = np.empty(1, np.uint64)
    state[0] = np.uint64(seed)
    accepted = 0
    proposed = 0
    for stage in range(temperatures.shape[0]):
        temperature = temperatures[stage]
        for _ in range(steps_per_stage):
            proposed += 1
            s = next_random(state) % slots
            a = slot_expert[s]
            g = s // slots_per_gpu
            limit = (neg_log[next_random(state) & 1023] * temperature) >> 20
            replace = replicas[a] > 1 and (next_random(state) & 1) == 0
            if replace:
                b = np.int32(next_random(state) % experts)
                if _find(where, replicas, b, g) >= 0:
                    continue
                r = -1
                h = g
            else:
                r = next_random(state) % slots
                b = slot_expert[r]
                h = r // slots_per_gpu
                if g == h or a == b:
                    continue
                if (replicas[a] > 1 and _find(where, replicas, a, h) >= 0) or (
                    replicas[b] > 1 and _find(where, replicas, b, g) >= 0
                ):
                    continue
            moves = home[a, g] - np.int64(home[b, g])
            new_g = new_here[g] + moves
            new_h = new_here[h]
            if not replace:
                new_h += home[b, h] - np.int64(home[a, h])
                moves += home[b, h] - np.int64(home[a, h])
            if (new_g > max_moves and new_g > new_here[g]) or (new_h > max_moves and new_h > new_here[h]):
                continue

            touched[0] = g
            touched_count = 1
            slot_expert[s] = b
            if replace:
                # b stops being pinned where it was alone; a becomes pinned where it remains alone.
                if replicas[b] == 1:
                    touched[touched_count] = where[b, 0]
                    touched_count += 1
                i = _find(where, replicas, a, g)
                for j in range(i, replicas[a] - 1):
                    where[a, j] = where[a, j + 1]
                replicas[a] -= 1
                if replicas[a] == 1 and (touched_count == 1 or touched[1] != where[a, 0]):
                    touched[touched_count] = where[a, 0]
                    touched_count += 1
                replicas[b] += 1
                where[b, replicas[b] - 1] = 1 << 30
                _retarget(where, replicas, b, 1 << 30, g)
            else:
                slot_expert[r] = a
                _retarget(where, replicas, a, g, h)
                _retarget(where, replicas, b, h, g)
                touched[1] = h
                touched_count = 2
            for i in range(touched_count):
                for w in range(words):
                    saved[i, w] = pinned[touched[i], w]
                saved_load[i] = pinned_load[touched[i]]
                pin_gpu(slot_expert, replicas, bits, item_load, slots_per_gpu, touched[i], pinned, pinned_load)
            new_cost, new_excess = evaluate_cover(
                replicas, where, bits, halves, members, item_load, gpus_per_node, num_nodes, gpu_weight, node_weight,
                spread_weight, pinned, pinned_load, load_cap, load_free, load_scale, imbalance_weight, visited,
                node_visited, load, work,
            )  # fmt: skip
            saved_profile[:] = gpu_profile
            if replace:
                for e in (a, b):
                    for i in range(replicas[e]):
                        _fill_profile(slot_expert, replicas, profile, slots_per_gpu, where[e, i], gpu_profile)
            else:
                _fill_profile(slot_expert, replicas, profile, slots_per_gpu, h, gpu_profile)
            _fill_profile(slot_expert, replicas, profile, slots_per_gpu, g, gpu_profile)
            new_cost += _squares(gpu_profile) * imbalance_weight >> SHIFT
            new_cost += cost_of_moves(new_here, move_cost) + move_cost * moves
            if new_excess < excess or (new_excess == excess and new_cost - cost <= limit):
                accepted += 1
                cost = new_cost
                excess = new_excess
                new_here[g] = new_g
                if not replace:
                    new_here[h] = new_h
                if excess < best_excess or (excess == best_excess and cost < best_cost):
                    best_cost = cost
                    best_excess = excess
                    best[:] = slot_expert
                continue
            gpu_profile[:] = saved_profile
            for i in range(touched_count):
                for w in range(words):
                    pinned[touched[i], w] = saved[i, w]
                pinned_load[touched[i]] = saved_load[i]
            slot_expert[s] = a
            if replace:
                i = _find(where, replicas, b, g)
                for j in range(i, replicas[b] - 1):
                    where[b, j] = where[b, j + 1]
                replicas[b] -= 1
                replicas[a] += 1
                where[a, replicas[a] - 1] = 1 << 30
                _retarget(where, replicas, a, 1 << 30, g)
            else:
                slot_expert[r] = b
                _retarget(where, replicas, a, h, g)
                _retarget(where, replicas, b, g, h)
    slot_expert[:] = best
    return proposed, accepted


@kernel
def cost_of_moves(new_here, move_cost):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for g in range(new_here.shape[0]):
        total += new_here[g]
    return total * move_cost
