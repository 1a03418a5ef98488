"""Who serves each expert of each sampled token, exact and in the rule's order (``cover``), while replicas move.

Every (token, expert) has a mask of the GPUs that hold the expert, in the token's own numbering of GPUs (numbering.py).
A mask has a word for every 64 GPUs; word w of a token's expert j is column j * words + w.
A proposal changes the masks of the tokens of two experts: they are collected as columns, served anew, and kept or
forgotten.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sglang_eplb_affinity.domain.numba_kernel import kernel, lowest_bit
from sglang_eplb_affinity.planner.bitmaps import expert_bitmaps
from sglang_eplb_affinity.planner.cover_serving import serve

LOAD_UNIT = 10  # bits of fraction of a token's load


class Sample(NamedTuple):
    """tokens int16 [T, k]; start, token, position: for each expert its tokens, shuffled, and their column.

    bits uint64 [experts, words]: the same as sets; load int64 [experts]: of a sampled token, << LOAD_UNIT.
    """

    tokens: np.ndarray
    start: np.ndarray
    token: np.ndarray
    position: np.ndarray
    bits: np.ndarray
    load: np.ndarray
    of_class: np.ndarray


def sample_of(tokens: np.ndarray, counts: np.ndarray, classes: int) -> Sample:
    """From tokens int16 [T, k] (-1: padding) and counts int64 [experts] of the whole window."""
    experts = len(counts)
    used = tokens >= 0
    row, column = np.nonzero(used)
    expert = tokens[used].astype(np.int64)
    mixed = (np.arange(len(expert), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    order = np.lexsort((mixed, expert))
    members = np.bincount(expert, minlength=experts)
    return Sample(
        np.ascontiguousarray(tokens), np.concatenate([[0], np.cumsum(members)]), row[order], column[order],
        expert_bitmaps(tokens, experts), (counts << LOAD_UNIT) // np.maximum(members, 1),
        np.arange(len(tokens)) % classes,
    )  # fmt: skip


class Served(NamedTuple):
    """masks, servers uint64 [T, k * words]: where a token's expert is held, and who serves it; cost int64 [T].

    load int64 [gpus], << LOAD_UNIT. The rest is a proposal's: its tokens int64 [T]; by column their masks and servers
    uint64 [k * words, T]; visited, near uint64 [T], for masks of one word: their GPUs and nodes; their cost; the load
    that would result.
    """

    masks: np.ndarray
    servers: np.ndarray
    cost: np.ndarray
    load: np.ndarray
    tried: np.ndarray
    tried_masks: np.ndarray
    tried_servers: np.ndarray
    visited: np.ndarray
    near: np.ndarray
    tried_cost: np.ndarray
    tried_load: np.ndarray


@kernel
def flip_gpus(numbering, flips, g, h):  # type: ignore[no-untyped-def]
    """The bits of GPUs g and h (none: -1) in flips uint64 [classes, words]."""
    words = flips.shape[1]
    for c in range(flips.shape[0]):
        for w in range(words):
            flips[c, w] = np.uint64(0)
        bit = np.int64(numbering.bit[g, c])
        flips[c, bit >> 6] ^= np.uint64(1) << np.uint64(bit & 63)
        if h >= 0:
            bit = np.int64(numbering.bit[h, c])
            flips[c, bit >> 6] ^= np.uint64(1) << np.uint64(bit & 63)


@kernel
def collect(sample, served, flips, a, b, first, last, both, count):  # type: ignore[no-untyped-def]
    """Append tokens number first to last of expert a's list, with the masks of a and b changed by ``flips``.

    flips uint64 [classes, words]. ``both``: tokens with b too are left out. Returns the number of tokens so far.
    """
    tokens = sample.tokens
    token = sample.token
    position = sample.position
    of_class = sample.of_class
    others = sample.bits[b]
    masks = served.masks
    tried = served.tried
    out = served.tried_masks
    columns = masks.shape[1]
    words = flips.shape[1]
    for i in range(first, last):
        t = token[i]
        has_b = (others[t >> 6] >> np.uint64(t & 63)) & np.uint64(1) != np.uint64(0)
        if both and has_b:
            continue
        flip = flips[of_class[t]]
        for j in range(columns):
            out[j, count] = masks[t, j]
        for w in range(words):
            out[position[i] * words + w, count] ^= flip[w]
        if has_b:
            for j in range(tokens.shape[1]):
                if tokens[t, j] == b:
                    for w in range(words):
                        out[j * words + w, count] ^= flip[w]
        tried[count] = t
        count += 1
    return count


@kernel
def try_load(sample, served, numbering, count):  # type: ignore[no-untyped-def]
    """The load that the collected tokens would leave, in tried_load."""
    tokens = sample.tokens
    of_class = sample.of_class
    load = sample.load
    servers = served.servers
    new_servers = served.tried_servers
    new_load = served.tried_load
    tried = served.tried
    gpu = numbering.gpu
    words = numbering.leaders.shape[0]
    none = np.uint64(0)
    new_load[:] = served.load
    for i in range(count):
        t = tried[i]
        for j in range(servers.shape[1]):
            before = servers[t, j]
            after = new_servers[j, i]
            if before != after:
                part = load[tokens[t, j // words]]
                bit = j % words << 6
                if before != none:
                    new_load[gpu[of_class[t], bit + lowest_bit(before)]] -= part
                if after != none:
                    new_load[gpu[of_class[t], bit + lowest_bit(after)]] += part


@kernel
def keep(served, count):  # type: ignore[no-untyped-def]
    tried = served.tried
    masks = served.masks
    servers = served.servers
    cost = served.cost
    new_masks = served.tried_masks
    new_servers = served.tried_servers
    new_cost = served.tried_cost
    served.load[:] = served.tried_load
    for i in range(count):
        t = tried[i]
        cost[t] = new_cost[i]
        for j in range(servers.shape[1]):
            servers[t, j] = new_servers[j, i]
            masks[t, j] = new_masks[j, i]


@kernel
def serve_all(sample, holds, numbering, gpu_weight, node_weight):  # type: ignore[no-untyped-def]
    """Every token served, with what is kept of it; holds int64 [experts, gpus], 1 where a GPU holds an expert."""
    total, k = sample.tokens.shape
    gpus = holds.shape[1]
    words = numbering.leaders.shape[0]
    columns = k * words
    served = Served(
        np.zeros((total, columns), np.uint64), np.zeros((total, columns), np.uint64), np.zeros(total, np.int64),
        np.zeros(gpus, np.int64), np.empty(total, np.int64), np.zeros((columns, total), np.uint64),
        np.zeros((columns, total), np.uint64), np.zeros(total, np.uint64), np.zeros(total, np.uint64),
        np.zeros(total, np.int64), np.zeros(gpus, np.int64),
    )  # fmt: skip
    for t in range(total):
        of_class = sample.of_class[t]
        served.tried[t] = t
        for j in range(k):
            e = sample.tokens[t, j]
            for g in range(gpus):
                if e >= 0 and holds[e, g] > 0:
                    bit = np.int64(numbering.bit[g, of_class])
                    served.tried_masks[j * words + (bit >> 6), t] |= np.uint64(1) << np.uint64(bit & 63)
    serve(served, numbering, gpu_weight, node_weight, 0, total)
    try_load(sample, served, numbering, total)  # none was served before
    keep(served, total)
    return served
