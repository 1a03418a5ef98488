"""The rule ``cover`` on tokens that token_service.py has collected: who serves their experts, and what that costs."""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.numba_kernel import kernel, lowest_bit, popcount


@kernel
def serve(served, numbering, gpu_weight, node_weight, first, last):  # type: ignore[no-untyped-def]
    """Serve the collected tokens first to last by the rule; returns the change of their cost."""
    if numbering.leaders.shape[0] == 1:
        _serve_narrow(served, numbering, gpu_weight, node_weight, first, last)
    else:
        _serve_wide(served, numbering, gpu_weight, node_weight, first, last)
    change = np.int64(0)
    for i in range(first, last):
        change += served.tried_cost[i] - served.cost[served.tried[i]]
    return change


@kernel
def _serve_narrow(served, numbering, gpu_weight, node_weight, first, last):  # type: ignore[no-untyped-def]
    """For masks of one word.

    Written as loops over tokens without branches, which the compiler turns into SIMD.
    """
    none = np.uint64(0)
    one = np.uint64(1)
    n = last - first
    visited = served.visited[first:last]
    near = served.near[first:last]
    node_masks = numbering.node_masks[:, 0]
    nodes = node_masks.shape[0]
    for i in range(n):
        visited[i] = none
    for j in range(served.tried_masks.shape[0]):
        row = served.tried_masks[j, first:last]
        for i in range(n):
            m = row[i]
            visited[i] |= m if m & (m - one) == none else none
    if nodes > 1:
        for i in range(n):
            near[i] = none
        for node in range(nodes):
            mask = node_masks[node]
            for i in range(n):
                near[i] |= mask if visited[i] & mask != none else none
    for j in range(served.tried_masks.shape[0]):
        row = served.tried_masks[j, first:last]
        server = served.tried_servers[j, first:last]
        if nodes > 1:
            for i in range(n):
                m = row[i]
                here = m & visited[i]
                c = m & near[i]
                c = c if c != none else m
                c = here if here != none else c
                server[i] = c & (~c + one)
            for i in range(n):
                visited[i] |= server[i]
            for node in range(nodes):
                mask = node_masks[node]
                for i in range(n):
                    near[i] |= mask if server[i] & mask != none else none
        else:
            for i in range(n):
                m = row[i]
                here = m & visited[i]
                c = here if here != none else m
                server[i] = c & (~c + one)
            for i in range(n):
                visited[i] |= server[i]
    cost = served.tried_cost[first:last]
    for i in range(n):
        cost[i] = gpu_weight * popcount(visited[i])
    if nodes > 1:
        leaders = numbering.leaders[0]
        for i in range(n):
            cost[i] += node_weight * popcount(near[i] & leaders)


@kernel
def _drawn(masks, j, i, among, t):  # type: ignore[no-untyped-def]
    """A bit of expert j's mask of token i (number t of the sample) that ``among`` uint64 [words] has too; -1: none.

    Each is as likely, and it is most often the same if others come and go (rendezvous hashing, Thaler and Ravishankar
    1998).
    """
    best = np.int64(-1)
    highest = np.uint64(0)
    words = among.shape[0]
    start = np.uint64(t) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(j) * np.uint64(0xD1B54A32D192ED03)
    for w in range(words):
        left = masks[j * words + w, i] & among[w]
        while left != np.uint64(0):
            bit = (w << 6) + lowest_bit(left)
            left &= left - np.uint64(1)
            z = start + np.uint64(bit) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
            if best < 0 or z > highest:
                best = bit
                highest = z
    return best


@kernel
def _serve_wide(served, numbering, gpu_weight, node_weight, first, last):  # type: ignore[no-untyped-def]
    """For masks of several words: token by token.

    What the rule leaves to a hash is left to one as well: orders of so many nodes would load a replica that is alone on
    its node more than others. Bit 0 is the token's source, the first node its own.
    """
    node_masks = numbering.node_masks
    nodes, words = node_masks.shape
    per_node = numbering.gpu.shape[1] // nodes
    masks = served.tried_masks
    servers = served.tried_servers
    k = masks.shape[0] // words
    everywhere = np.full(words, ~np.uint64(0), np.uint64)
    visited = np.empty(words, np.uint64)
    near = np.empty(words, np.uint64)
    for i in range(first, last):
        t = served.tried[i]
        visited[:] = np.uint64(0)
        near[:] = np.uint64(0)
        cost = np.int64(0)
        # Experts with one replica first, then all in turn: what those add is the same again.
        for of_all in range(2):
            for j in range(k):
                bit = np.int64(-1)
                if of_all == 0:
                    replicas = np.int64(0)
                    for w in range(words):
                        replicas += popcount(masks[j * words + w, i])
                    if replicas == 1:
                        bit = _drawn(masks, j, i, everywhere, t)
                else:
                    bit = _drawn(masks, j, i, visited, t)
                    if bit < 0:
                        bit = _drawn(masks, j, i, near, t)
                    if bit < 0 and masks[j * words, i] & np.uint64(1) != np.uint64(0):
                        bit = np.int64(0)  # the source
                    if bit < 0:
                        bit = _drawn(masks, j, i, node_masks[0], t)
                    if bit < 0:
                        bit = _drawn(masks, j, i, everywhere, t)
                    for w in range(words):
                        servers[j * words + w, i] = np.uint64(0)
                if bit < 0:
                    continue
                at = bit >> 6
                one = np.uint64(1) << np.uint64(bit & 63)
                if of_all == 1:
                    servers[j * words + at, i] = one
                if visited[at] & one == np.uint64(0):
                    visited[at] |= one
                    cost += gpu_weight
                if near[at] & one == np.uint64(0):
                    mask = node_masks[bit // per_node]
                    for w in range(words):
                        near[w] |= mask[w]
                    cost += node_weight if nodes > 1 else 0
        served.tried_cost[i] = cost
