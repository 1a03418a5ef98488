"""Annealed swaps of items between GPUs with exact fan-out from token sets, where each item has one place.

An item is an expert, or a replica with the tokens that a source-independent rule sends to it. For every item a and GPU
h the search keeps ``enter[a, h]``, the tokens of a that h does not serve yet, and ``leave[a]``, the tokens for which a
is alone on its GPU. The change of fan-out when a and b swap is then

    enter[a, h] - leave[a] + enter[b, g] - leave[b] + |tokens of a and b where a or b is alone|

and the last term, the only one that needs the token sets, cannot be negative: most swaps are refused without it. The
same tables over nodes give the node fan-out.
"""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.numba_kernel import kernel, popcount
from sglang_eplb_affinity.planner.imbalance import SHIFT
from sglang_eplb_affinity.planner.random_steps import next_random

# A stage ends early after so many accepted swaps per slot: where most swaps cost nothing (few experts, little traffic)
# they would be accepted without end, and accepting is the expensive part.
ACCEPTED_PER_SLOT = 8


@kernel
def _init_level(tokens, place, count, alone_bits, enter, leave):  # type: ignore[no-untyped-def]
    """Fill one level's tables from scratch. place int32 [items]: GPU (or node) of each item."""
    total, k = tokens.shape
    units = count.shape[1]
    count[:] = 0
    alone_bits[:] = 0
    enter[:] = 0
    leave[:] = 0
    for t in range(total):
        for j in range(k):
            if tokens[t, j] >= 0:
                count[t, place[tokens[t, j]]] += 1
    for t in range(total):
        for j in range(k):
            item = tokens[t, j]
            if item < 0:
                continue
            for u in range(units):
                if count[t, u] == 0:
                    enter[item, u] += 1
            if count[t, place[item]] == 1:
                leave[item] += 1
                alone_bits[place[item], t >> 6] |= np.uint64(1) << np.uint64(t & 63)


@kernel
def _move(tokens, bits, place, count, alone_bits, enter, leave, a, b, g, h, start, members):  # type: ignore[no-untyped-def]
    """Update one level for a: g -> h, as one half of a swap with b. Tokens that hold both keep their counts."""
    k = tokens.shape[1]
    for i in range(start[a], start[a + 1]):
        t = members[i]
        word = t >> 6
        bit = np.uint64(1) << np.uint64(t & 63)
        if bits[b, word] & bit:
            continue
        count[t, g] -= 1
        if count[t, g] == 0:
            alone_bits[g, word] &= ~bit
            for j in range(k):
                if tokens[t, j] >= 0:
                    enter[tokens[t, j], g] += 1
        elif count[t, g] == 1:
            alone_bits[g, word] |= bit
            for j in range(k):
                item = tokens[t, j]
                if item >= 0 and item != a and place[item] == g:
                    leave[item] += 1
        count[t, h] += 1
        if count[t, h] == 1:
            alone_bits[h, word] |= bit
            for j in range(k):
                if tokens[t, j] >= 0:
                    enter[tokens[t, j], h] -= 1
        elif count[t, h] == 2:
            alone_bits[h, word] &= ~bit
            for j in range(k):
                item = tokens[t, j]
                if item >= 0 and item != a and place[item] == h:
                    leave[item] -= 1


@kernel
def _alone(bits, alone_bits, a, g):  # type: ignore[no-untyped-def]
    """Tokens of a for which its GPU (node) g serves nothing else."""
    total = 0
    for w in range(bits.shape[1]):
        total += popcount(bits[a, w] & alone_bits[g, w])
    return total


@kernel
def _both_alone(bits, alone_bits, a, b, g, h):  # type: ignore[no-untyped-def]
    total = 0
    for w in range(bits.shape[1]):
        total += popcount(bits[a, w] & bits[b, w] & (alone_bits[g, w])) + popcount(
            bits[a, w] & bits[b, w] & alone_bits[h, w]
        )
    return total


@kernel
def search_swaps(slot_item, items, grid, costs, balance, moves, steps):  # type: ignore[no-untyped-def]
    """Improve ``slot_item`` int32 [slots] in place; returns (proposed, accepted) int64.

    items, grid, costs, balance, moves and steps: see search_arguments.py; ``costs.spread`` and ``moves.unit`` are not
    looked at. A swap may not raise any GPU over the cap unless it lowers the excess. Costs are integers: fan-out in
    tokens times weight.
    """
    tokens, bits, start, members, item_expert, item_load = items
    slots_per_gpu, gpus_per_node, num_nodes = grid
    gpu_weight, node_weight, move_cost = costs.gpu, costs.node, costs.move
    load_cap, load_free, load_scale, profile, imbalance_weight = balance
    home, max_moves = moves.home, moves.most
    temperatures, neg_log, steps_per_stage, seed = steps
    slots = slot_item.shape[0]
    gpus = slots // slots_per_gpu
    num_items = bits.shape[0]
    words = bits.shape[1]
    total = tokens.shape[0]
    place = np.empty(num_items, np.int32)
    node_place = np.empty(num_items, np.int32)
    load = np.zeros(gpus, np.int64)
    new_here = np.zeros(gpus, np.int64)
    experts = home.shape[0]
    holds = np.zeros((experts, gpus), np.uint8)
    for s in range(slots):
        item = slot_item[s]
        place[item] = s // slots_per_gpu
        node_place[item] = place[item] // gpus_per_node
        load[place[item]] += item_load[item]
        holds[item_expert[item], place[item]] += 1
        new_here[place[item]] += 1 - home[item_expert[item], place[item]]
    count = np.zeros((total, gpus), np.uint8)
    alone = np.zeros((gpus, words), np.uint64)
    enter = np.zeros((num_items, gpus), np.int32)
    leave = np.zeros(num_items, np.int32)
    _init_level(tokens, place, count, alone, enter, leave)
    two_levels = num_nodes > 1 and node_weight > 0
    levels = num_nodes if two_levels else 1
    node_count = np.zeros((total if two_levels else 1, levels), np.uint8)
    node_alone = np.zeros((levels, words), np.uint64)
    node_enter = np.zeros((num_items, levels), np.int32)
    node_leave = np.zeros(num_items, np.int32)
    if two_levels:
        _init_level(tokens, node_place, node_count, node_alone, node_enter, node_leave)

    columns = profile.shape[1]
    gpu_profile = np.zeros((gpus, columns), np.int32)
    for item in range(num_items):
        for c in range(columns):
            gpu_profile[place[item], c] += profile[item, c]

    state = np.empty(1, np.uint64)
    state[0] = np.uint64(seed)
    accepted = 0
    proposed = 0
    for stage in range(temperatures.shape[0]):
        temperature = temperatures[stage]
        stage_end = accepted + ACCEPTED_PER_SLOT * slots
        for _ in range(steps_per_stage):
            if accepted >= stage_end:
                break
            proposed += 1
            s = next_random(state) % slots
            r = next_random(state) % slots
            a = slot_item[s]
            b = slot_item[r]
            g = place[a]
            h = place[b]
            if g == h:
                continue
            limit = (neg_log[next_random(state) & 1023] * temperature) >> 20
            delta = gpu_weight * (enter[a, h] + enter[b, g] - leave[a] - leave[b])
            cross = two_levels and node_place[a] != node_place[b]
            if cross:
                ng = node_place[a]
                nh = node_place[b]
                delta += node_weight * (node_enter[a, nh] + node_enter[b, ng] - node_leave[a] - node_leave[b])
            ea = item_expert[a]
            eb = item_expert[b]
            more_h = home[ea, g] - np.int64(home[ea, h])
            more_g = home[eb, h] - np.int64(home[eb, g])
            delta += move_cost * (more_h + more_g)
            if delta > limit or ea == eb:
                continue
            # What leaves a GPU frees one of its moves, what enters takes one.
            new_g = new_here[g] - (1 - home[ea, g]) + (1 - home[eb, g])
            new_h = new_here[h] - (1 - home[eb, h]) + (1 - home[ea, h])
            if (new_g > max_moves and new_g > new_here[g]) or (new_h > max_moves and new_h > new_here[h]):
                continue
            if holds[ea, h] or holds[eb, g]:
                continue
            shift = item_load[a] - item_load[b]
            excess = max(load[g] - load_cap, 0) + max(load[h] - load_cap, 0)
            after = max(load[g] - shift - load_cap, 0) + max(load[h] + shift - load_cap, 0)
            if after > excess or (after == excess and after > 0 and delta >= 0):
                continue
            if after == excess:
                squares = np.int64(0)
                excess_g = max(load[g] - load_free, 0) * load_scale >> 20
                excess_h = max(load[h] - load_free, 0) * load_scale >> 20
                after_g = max(load[g] - shift - load_free, 0) * load_scale >> 20
                after_h = max(load[h] + shift - load_free, 0) * load_scale >> 20
                for c in range(columns):
                    d = np.int64(profile[b, c]) - profile[a, c]
                    squares += d * (d + gpu_profile[g, c] - gpu_profile[h, c])
                squares = (
                    2 * squares + after_g * after_g + after_h * after_h - excess_g * excess_g - excess_h * excess_h
                )
                delta += squares * imbalance_weight >> SHIFT
                if delta > limit:
                    continue
                delta += gpu_weight * _both_alone(bits, alone, a, b, g, h)
                if cross and delta <= limit:
                    delta += node_weight * _both_alone(bits, node_alone, a, b, ng, nh)
                if delta > limit:
                    continue
            accepted += 1
            place[a] = h
            place[b] = g
            _move(tokens, bits, place, count, alone, enter, leave, a, b, g, h, start, members)
            _move(tokens, bits, place, count, alone, enter, leave, b, a, h, g, start, members)
            leave[a] = _alone(bits, alone, a, h)
            leave[b] = _alone(bits, alone, b, g)
            if cross:
                node_place[a] = nh
                node_place[b] = ng
                _move(
                    tokens, bits, node_place, node_count, node_alone, node_enter, node_leave, a, b, ng, nh, start,
                    members,
                )  # fmt: skip
                _move(
                    tokens, bits, node_place, node_count, node_alone, node_enter, node_leave, b, a, nh, ng, start,
                    members,
                )  # fmt: skip
                node_leave[a] = _alone(bits, node_alone, a, nh)
                node_leave[b] = _alone(bits, node_alone, b, ng)
            slot_item[s] = b
            slot_item[r] = a
            holds[ea, g] -= 1
            holds[ea, h] += 1
            holds[eb, h] -= 1
            holds[eb, g] += 1
            for c in range(columns):
                d = profile[b, c] - profile[a, c]
                gpu_profile[g, c] += d
                gpu_profile[h, c] -= d
            load[g] -= shift
            load[h] += shift
            new_here[g] = new_g
            new_here[h] = new_h
    return proposed, accepted
