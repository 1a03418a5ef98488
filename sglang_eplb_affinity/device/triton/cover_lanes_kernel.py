"""The rule `cover` for small passes, in Triton: a thread for each column of a token.

In a step, every thread of a token hears where one more column goes, which is one exchange between threads of a warp.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

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


@triton.jit
def _from_column(of, first, j: tl.constexpr):
    """[items]: the token's column j in all its columns."""
    return tl.gather(of, first + j, 0)


@triton.jit
def _with_place(near, near_node, valid, gpus, place, NODES: tl.constexpr, FIELD: tl.constexpr, NODE_STEP: tl.constexpr):
    """The near replicas when the token goes to one more place."""
    near |= near_of(valid, apart(gpus, place, FIELD, 1), FIELD)
    if NODES:
        near_node |= near_of(valid, apart(gpus, place, FIELD, NODE_STEP), FIELD)
    return near, near_node


@triton.jit
def choose_in_lanes(
    row, col, experts, counts, slots, weights,
    K: tl.constexpr, SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, NUM_NODES: tl.constexpr,
    SOURCE: tl.constexpr, FIELD: tl.constexpr, NODE_STEP: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """cover_kernel.choose_in_registers for [items], the columns of a token side by side; the items of one warp, or
    exchanges go through shared memory.
    """
    NODES: tl.constexpr = NUM_NODES > 1 and GPUS_PER_NODE > 1
    gpus, valid, otherwise, choices = prepared(
        row, experts, counts, slots, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE, NODES, FIELD, NODE_STEP
    )
    first = tl.arange(0, experts.numel) - col  # the token's first item
    a = place_of(gpus, FIELD)
    b = place_of(gpus >> FIELD, FIELD)
    c = place_of(gpus >> (2 * FIELD), FIELD)
    d = place_of(gpus >> (3 * FIELD), FIELD)
    # The replicas on a GPU, or a node, that the token goes to: at first because of experts with one replica.
    near = tl.zeros(gpus.shape, gpus.dtype)
    near_node = near
    single = counts == 1
    places = tl.where(single, a, nowhere(gpus, FIELD))
    anywhere = experts < -1
    for j in tl.static_range(K):
        place = _from_column(places, first, j)
        near, near_node = _with_place(near, near_node, valid, gpus, place, NODES, FIELD, NODE_STEP)
        if NUM_NODES == 1 and SOURCE >= 0:  # the node of one column is every column's
            state = _from_column(single.to(tl.int32) * 2 + (experts >= 0).to(tl.int32), first, j)
            anywhere |= (state == 3) | ((state == 1) & (j < col))
    if NUM_NODES == 1 and SOURCE >= 0:
        otherwise = tl.where(anywhere, valid, otherwise)
    indices = experts * 0
    tied = experts * 0
    hashed = replica_hash(row, tl.maximum(experts, 0), SOURCE)
    for j in tl.static_range(K):
        candidates = otherwise
        if NODES:
            candidates = near_first(near_node, candidates)
        candidates = near_first(near, candidates)
        if WEIGHTED:  # noqa: SIM108 (one of the two is compiled)
            index = drawn(candidates, hashed, weights, FIELD)
        else:
            index = choices >> doubled_mask(candidates, FIELD)  # and what is above its two bits
        tied = tl.where(col == j, has_several(candidates), tied)
        indices = tl.where(col == j, (index & 3).to(tl.int32), indices)
        if j < K - 1:
            odd = index & 1 != 0
            place = _from_column(tl.where(index & 2 != 0, tl.where(odd, d, c), tl.where(odd, b, a)), first, j)
            near, near_node = _with_place(near, near_node, valid, gpus, place, NODES, FIELD, NODE_STEP)
    return pick(slots, indices), tied
