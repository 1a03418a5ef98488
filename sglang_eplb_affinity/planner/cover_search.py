"""Annealed search over which experts are replicated and where, for the dispatch rule ``cover``.

Every proposal is evaluated exactly on the token sample, 64 tokens at a time: the tokens that GPU g must serve are the
union (OR) of the bitmaps of its experts that have one replica; then each replicated expert adds, on one of its GPUs,
the tokens that visit none of them yet. Popcounts give fan-outs and each replica's share of its expert's load. Two
differences to dispatch.py remain, neither of which changes a total in expectation: replicated experts take their turn
by id instead of top-k order, and ties are broken by random bitmaps (``halves``, one fair coin per token and expert)
instead of the hash.

Two kinds of proposals: swap the contents of two slots of different GPUs; or turn one replica of an expert that has
several into a replica of another expert.
"""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity._numba import kernel, popcount
from sglang_eplb_affinity.planner.imbalance import SHIFT
from sglang_eplb_affinity.planner.random_steps import next_random


@kernel
def pin_gpu(slot_expert, replicas, bits, item_load, slots_per_gpu, g, pinned, pinned_load):  # type: ignore[no-untyped-def]
    """Recompute the tokens and the load that GPU g must serve: its experts with one replica."""
    row = pinned[g]
    row[:] = 0
    load = np.int64(0)
    for s in range(g * slots_per_gpu, (g + 1) * slots_per_gpu):
        e = slot_expert[s]
        if replicas[e] == 1:
            load += item_load[e]
            source = bits[e]
            for w in range(row.shape[0]):
                row[w] |= source[w]
    pinned_load[g] = load


@kernel
def _serve_many(  # type: ignore[no-untyped-def]
    e, count, where, bits, members, item_load, gpus_per_node, two_levels, visited, node_visited, load, taken
):
    """Dispatch the tokens of one expert with three or more replicas; updates visited, node_visited and load.

    Instead of coins, the order in which replicas are asked rotates from word to word. taken int64 [gpus]: scratch.
    """
    for i in range(count):
        taken[i] = 0
    for w in range(visited.shape[1]):
        rest = bits[e, w]
        first = (w + e) % count
        for step in range(count):
            i = first + step if first + step < count else first + step - count
            take = rest & visited[where[e, i], w]
            taken[i] += popcount(take)
            rest &= ~take
        if two_levels and rest:
            for step in range(count):
                i = first + step if first + step < count else first + step - count
                node = where[e, i] // gpus_per_node
                take = rest & node_visited[node, w]
                taken[i] += popcount(take)
                visited[where[e, i], w] |= take
                rest &= ~take
        if rest:
            g = where[e, first]
            taken[first] += popcount(rest)
            visited[g, w] |= rest
            if two_levels:
                node_visited[g // gpus_per_node, w] |= rest
    for i in range(count):
        load[where[e, i]] += item_load[e] * taken[i] // members[e]


@kernel
def evaluate_cover(  # type: ignore[no-untyped-def]
    replicas, where, bits, halves, members, item_load, gpus_per_node, num_nodes, gpu_weight, node_weight, spread_weight,
    pinned, pinned_load, load_cap, load_free, load_scale, imbalance_weight, visited, node_visited, load, work,
):  # fmt: skip
    """(cost, load excess) of a state; fills visited, node_visited and load."""
    gpus, words = pinned.shape
    two_levels = num_nodes > 1
    for g in range(gpus):
        for w in range(words):
            visited[g, w] = pinned[g, w]
        load[g] = pinned_load[g]
    if two_levels:
        node_visited[:] = 0
        for g in range(gpus):
            node = g // gpus_per_node
            for w in range(words):
                node_visited[node, w] |= visited[g, w]
    taken_by = np.empty(gpus, np.int64)
    cost = np.int64(0)
    for e in range(replicas.shape[0]):
        if replicas[e] > 1:
            if members[e] > 0 and replicas[e] > 2:
                _serve_many(
                    e, replicas[e], where, bits, members, item_load, gpus_per_node, two_levels, visited, node_visited,
                    load, taken_by,
                )  # fmt: skip
            elif members[e] > 0:
                # Two replicas, the common case, in line: passing a dozen arrays to a function costs more than the
                # loops. One array is written per loop: with more, the compiler's overlap checks get too many and it
                # gives up on SIMD.
                g = where[e, 0]
                h = where[e, 1]
                m = g // gpus_per_node
                n = h // gpus_per_node
                if two_levels and m != n:
                    for w in range(words):
                        here = visited[g, w]
                        there = visited[h, w]
                        near = node_visited[m, w]
                        far = node_visited[n, w]
                        coin = halves[e, w]
                        on_gpu = here & (coin | ~there)
                        on_node = ~there & ((near & (coin | ~far)) | (~far & coin))
                        work[w] = bits[e, w] & (on_gpu | (~here & on_node))
                    for w in range(words):
                        node_visited[m, w] |= work[w]
                    for w in range(words):
                        node_visited[n, w] |= bits[e, w] & ~work[w]
                else:
                    for w in range(words):
                        here = visited[g, w]
                        there = visited[h, w]
                        coin = halves[e, w]
                        work[w] = bits[e, w] & ((here & (coin | ~there)) | (~here & ~there & coin))
                    if two_levels:
                        for w in range(words):
                            node_visited[m, w] |= bits[e, w]
                taken = np.int64(0)
                for w in range(words):
                    taken += popcount(work[w])
                for w in range(words):
                    visited[g, w] |= work[w]
                for w in range(words):
                    visited[h, w] |= bits[e, w] & ~work[w]
                part = item_load[e] * taken // members[e]
                load[g] += part
                load[h] += item_load[e] - part
            if spread_weight > 0 and two_levels:
                covered = np.int64(0)
                for i in range(replicas[e]):
                    fresh = 1
                    for j in range(i):
                        if where[e, j] // gpus_per_node == where[e, i] // gpus_per_node:
                            fresh = 0
                    covered += fresh
                cost -= spread_weight * members[e] * (covered - 1) // num_nodes
    fan = np.int64(0)
    for g in range(gpus):
        for w in range(words):
            fan += popcount(visited[g, w])
    cost += gpu_weight * fan
    if two_levels:
        fan = np.int64(0)
        for n in range(num_nodes):
            for w in range(words):
                fan += popcount(node_visited[n, w])
        cost += node_weight * fan
    excess = np.int64(0)
    squares = np.int64(0)
    for g in range(gpus):
        if load[g] > load_cap:
            excess += load[g] - load_cap
        scaled = max(load[g] - load_free, 0) * load_scale >> 20
        squares += scaled * scaled
    return cost + (squares * imbalance_weight >> SHIFT), excess


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
def search_cover(  # type: ignore[no-untyped-def]
    bits, halves, members, item_load, slot_expert, slots_per_gpu, gpus_per_node, num_nodes, gpu_weight, node_weight,
    spread_weight, load_cap, load_free, load_scale, profile, imbalance_weight, home, move_cost, max_moves, temperatures,
    neg_log, steps_per_stage, seed,
):  # fmt: skip
    """Improve ``slot_expert`` int32 [slots] in place; returns (proposed, accepted) int64.

    bits uint64 [experts, words] and members int64 [experts] (its popcounts): the token sample; item_load int64
    [experts]: load of each expert over the whole window. The cost of imbalance is a sum of squares times
    ``imbalance_weight`` >> SHIFT: of each GPU's load above ``load_free`` times ``load_scale`` / 2**20, and of its
    columns of profile int32 [experts, columns] (load by block of time). The rest as in swap_search.search_swaps.
    No GPU may hold an expert twice at the start.
    """
    slots = slot_expert.shape[0]
    experts, words = bits.shape
    gpus = slots // slots_per_gpu
    replicas = np.zeros(experts, np.int64)
    where = np.zeros((experts, gpus), np.int64)
    new_here = np.zeros(gpus, np.int64)
    for s in range(slots):
        e = slot_expert[s]
        g = s // slots_per_gpu
        where[e, replicas[e]] = g
        replicas[e] += 1
        new_here[g] += 1 - home[e, g]
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
