"""Token sets drawn from a co-activation matrix, for windows (older dumps) that have no token sample."""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.planner.random_steps import next_random


@kernel
def draw_tokens(counts, coactivation, k, num_tokens, seed):  # type: ignore[no-untyped-def]
    """int16 [num_tokens, k]: sets whose pairs occur roughly as often as in the matrix.

    The first expert is drawn by its count; each further one by count times its mean lift with those drawn already
    (lift: how much more often two experts meet than independent ones would). counts int64 [experts], coactivation
    int64 [experts, experts].
    """
    experts = counts.shape[0]
    total = max(counts.sum() // k, 1)
    state = np.empty(1, np.uint64)
    state[0] = np.uint64(seed)
    out = np.full((num_tokens, k), -1, np.int16)
    weight = np.empty(experts, np.float64)
    lift = np.empty(experts, np.float64)
    for t in range(num_tokens):
        for e in range(experts):
            weight[e] = counts[e]
            lift[e] = 1.0
        for j in range(k):
            mass = 0.0
            for e in range(experts):
                mass += weight[e] * lift[e]
            if mass <= 0.0:
                break
            target = mass * (next_random(state) / 2147483648.0)
            pick = -1
            for e in range(experts):
                share = weight[e] * lift[e]
                if share > 0.0:
                    pick = e
                    target -= share
                    if target < 0.0:
                        break
            out[t, j] = pick
            weight[pick] = 0.0
            for e in range(experts):
                if weight[e] > 0.0:
                    expected = counts[pick] * counts[e] / total
                    lift[e] *= (coactivation[pick, e] + 0.5) / (expected + 0.5)
    return out
