"""The traffic and load of one layer under the dispatch rule ``cover``, exact on the token sample, 64 tokens at a time.

The tokens that GPU g must serve are the union (OR) of the bitmaps of its experts that have one replica; then each
replicated expert adds, on one of its GPUs, the tokens that visit none of them yet. Popcounts give fan-outs and each
replica's share of its expert's load. Two differences to dispatch.py remain, neither of which changes a total in
expectation: replicated experts take their turn by id instead of top-k order, and ties are broken by random bitmaps
(``halves``, one fair coin per token and expert) instead of the hash.
"""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.numba_kernel import kernel, popcount
from sglang_eplb_affinity.planner.imbalance import SHIFT


@kernel
def locate_replicas(slot_expert, slots_per_gpu, home, replica_gpus, replicas, new_here):  # type: ignore[no-untyped-def]
    """Fill in each expert's GPUs and their number, and how many experts of each GPU are new to it (all 0 before)."""
    for s in range(slot_expert.shape[0]):
        e = slot_expert[s]
        g = s // slots_per_gpu
        replica_gpus[e, replicas[e]] = g
        replicas[e] += 1
        new_here[g] += 1 - home[e, g]


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
