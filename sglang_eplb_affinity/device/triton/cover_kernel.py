"""The rule `cover` in Triton.

Which replica serves a column depends on what the columns before it got, so the columns of a token are K steps. In a
large pass each thread chooses for a token of its own (choose_in_registers): tensors are [tokens, columns] with at least
as many tokens as threads. Triton then keeps all columns of a token in one thread: a reduction over columns exchanges
nothing, and taking a column whose number is known when the kernel is compiled costs nothing. A small pass waits for the
one thread that does all of a token's work, so there each column has a thread (cover_lanes_kernel.py). Where an expert
has more replicas than a word holds, loops over all of them choose.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from sglang_eplb_affinity.device.triton.balance_kernel import weight_of_slot
from sglang_eplb_affinity.device.triton.cover_fields_kernel import (
    apart,
    doubled_mask,
    drawn,
    has_several,
    near_first,
    near_of,
    nowhere,
    pick,
    place_of,
    prepared,
    replica_hash,
)

_NOWHERE = tl.constexpr(0xFFFFFFFF)  # no GPU and no node


@triton.jit
def _and(a, b):
    return a & b


@triton.jit
def _column(of, is_j):
    """[tokens]: one column of [tokens, columns]."""
    return tl.sum(tl.where(is_j, of, 0), 1).to(of.dtype)


@triton.jit
def choose_in_registers(
    row, col, experts, counts, slots, weights,
    K: tl.constexpr, SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, NUM_NODES: tl.constexpr,
    SOURCE: tl.constexpr, FIELD: tl.constexpr, NODE_STEP: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """(slots, whether there were others) [tokens, columns] of experts with at most cover_words.READ_AHEAD replicas.

    row [tokens, 1]; col [1, columns]; experts and counts [tokens, columns]: -1 and 0 where a column is not used (which
    gets any slot); slots, and weights if WEIGHTED: four of the same shape. FIELD and NODE_STEP:
    :class:`cover_words.GpuCodes`.
    """
    NODES: tl.constexpr = NUM_NODES > 1 and GPUS_PER_NODE > 1
    gpus, valid, otherwise, choices = prepared(
        row, experts, counts, slots, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE, NODES, FIELD, NODE_STEP
    )
    # Where the token goes: at first the GPUs of experts with one replica.
    places = tl.where(counts == 1, place_of(gpus, FIELD), nowhere(gpus, FIELD))
    anywhere = tl.max((counts == 1).to(tl.int32), 1)
    indices = experts * 0
    tied = experts * 0
    hashes = replica_hash(row, tl.maximum(experts, 0), SOURCE)
    for j in tl.static_range(K):
        is_j = col == j
        gpus_j = _column(gpus, is_j)
        valid_j = _column(valid, is_j)
        candidates = _column(otherwise, is_j)
        # A replica is near unless it is apart from every place.
        if NODES:
            apart_j = tl.reduce(apart(gpus_j[:, None], places, FIELD, NODE_STEP), 1, _and)
            candidates = near_first(near_of(valid_j, apart_j, FIELD), candidates)
        if NUM_NODES == 1:
            candidates = tl.where(anywhere > 0, valid_j, candidates)
        apart_j = tl.reduce(apart(gpus_j[:, None], places, FIELD, 1), 1, _and)
        candidates = near_first(near_of(valid_j, apart_j, FIELD), candidates)
        if WEIGHTED:
            of = (
                _column(weights[0], is_j), _column(weights[1], is_j), _column(weights[2], is_j),
                _column(weights[3], is_j),
            )  # fmt: skip
            index = drawn(candidates, _column(hashes, is_j), of, FIELD)
        else:
            index = (_column(choices, is_j) >> doubled_mask(candidates, FIELD)) & 3
        tied = tl.where(is_j, has_several(candidates)[:, None], tied)
        indices = tl.where(is_j, index[:, None].to(tl.int32), indices)
        place = place_of(gpus_j >> (index * FIELD).to(gpus.dtype), FIELD)
        places = tl.where(is_j, place[:, None], places)
        anywhere |= _column((experts >= 0).to(tl.int32), is_j)
    return pick(slots, indices), tied


@triton.jit
def _level(
    slot, at_gpu, at_node, SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, SOURCE: tl.constexpr
):  # fmt: skip
    """The first of the sets of candidates that each slot [tokens] belongs to, 0 to 4; 5 for no slot (-1)."""
    gpu = slot.to(tl.uint32) // SLOTS_PER_GPU
    node = gpu // GPUS_PER_NODE
    level = slot * 0 + 4
    if SOURCE >= 0:
        level = tl.where(node == SOURCE // GPUS_PER_NODE, 3, level)
        level = tl.where(gpu == SOURCE, 2, level)
    level = tl.where(tl.max((at_node == node[:, None]).to(tl.int32), 1) > 0, 1, level)
    level = tl.where(tl.max((at_gpu == gpu[:, None]).to(tl.int32), 1) > 0, 0, level)
    return tl.where(slot >= 0, level, 5)


@triton.jit
def choose_in_loops(
    row, col, experts, counts, first_slots, table, gpu_weights,
    K: tl.constexpr, WIDTH: tl.constexpr, SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr,
    SOURCE: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """As choose_in_registers, for any number of replicas. first_slots [tokens, columns]: the first replica of
    each; gpu_weights: of every GPU, read if WEIGHTED."""
    first_gpu = first_slots.to(tl.uint32) // SLOTS_PER_GPU
    at_gpu = tl.where(counts == 1, first_gpu, _NOWHERE).to(tl.uint32)
    at_node = tl.where(counts == 1, first_gpu // GPUS_PER_NODE, _NOWHERE).to(tl.uint32)
    all_chosen = first_slots
    tied = experts * 0
    j = 0
    while j < K:
        is_j = col == j
        expert = tl.maximum(_column(experts, is_j), 0)
        count = _column(counts, is_j)
        first = table + expert * WIDTH
        most = tl.max(count, 0)
        best = count * 0 + 4
        size = count * 0
        total = (count * 0).to(tl.uint32)
        r = 0
        while r < most:
            slot = tl.load(first + r, mask=r < count, other=-1).to(tl.int32)
            level = _level(slot, at_gpu, at_node, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE)
            size = tl.where(level < best, 0, size) + (level <= best).to(tl.int32)
            if WEIGHTED:
                weight = weight_of_slot(gpu_weights, slot, SLOTS_PER_GPU)
                total = tl.where(level < best, 0, total) + tl.where(level <= best, weight, 0)
            best = tl.minimum(level, best)
            r += 1
        hashed = _column(replica_hash(row, tl.maximum(experts, 0), SOURCE), is_j)
        if WEIGHTED:  # noqa: SIM108 (one of the two is compiled)
            wanted = tl.umulhi(hashed, total)
        else:
            wanted = hashed % tl.maximum(size, 1).to(tl.uint32)
        chosen = count * 0 - 1
        passed = (count * 0).to(tl.uint32)
        r = 0
        while r < most:
            slot = tl.load(first + r, mask=r < count, other=-1).to(tl.int32)
            level = _level(slot, at_gpu, at_node, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE)
            share = (level == best).to(tl.uint32)
            if WEIGHTED:
                share *= weight_of_slot(gpu_weights, slot, SLOTS_PER_GPU)
            chosen = tl.where((wanted >= passed) & (wanted < passed + share), slot, chosen)
            passed += share
            r += 1
        gpu = tl.where(count > 0, chosen.to(tl.uint32) // SLOTS_PER_GPU, _NOWHERE).to(tl.uint32)
        node = tl.where(count > 0, gpu // GPUS_PER_NODE, _NOWHERE).to(tl.uint32)
        all_chosen = tl.where(is_j, chosen[:, None], all_chosen)
        tied = tl.where(is_j, (size > 1).to(tl.int32)[:, None], tied)
        at_gpu = tl.where(is_j, gpu[:, None], at_gpu)
        at_node = tl.where(is_j, node[:, None], at_node)
        j += 1
    return all_chosen, tied
