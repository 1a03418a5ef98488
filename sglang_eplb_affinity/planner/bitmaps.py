"""Token sets as bitmaps, one bit per sampled token, 64 tokens a word, and as lists."""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.numba_kernel import kernel


@kernel
def expert_bitmaps(tokens, num_experts):  # type: ignore[no-untyped-def]
    """uint64 [experts, words] from tokens int16 [T, k]: bit t of row e says that token t chose expert e."""
    count, k = tokens.shape
    bits = np.zeros((num_experts, (count + 63) // 64), np.uint64)
    for t in range(count):
        for j in range(k):
            if tokens[t, j] >= 0:
                bits[tokens[t, j], t >> 6] |= np.uint64(1) << np.uint64(t & 63)
    return bits


@kernel
def token_lists(tokens, num_items):  # type: ignore[no-untyped-def]
    """(start int64 [items + 1], token int32 [assignments]): the tokens that chose each item, rising."""
    count, k = tokens.shape
    start = np.zeros(num_items + 1, np.int64)
    for t in range(count):
        for j in range(k):
            if tokens[t, j] >= 0:
                start[tokens[t, j] + 1] += 1
    for i in range(num_items):
        start[i + 1] += start[i]
    fill = start[:-1].copy()
    out = np.empty(start[num_items], np.int32)
    for t in range(count):
        for j in range(k):
            item = tokens[t, j]
            if item >= 0:
                out[fill[item]] = t
                fill[item] += 1
    return start, out
