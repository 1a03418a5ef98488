"""Integer-only random numbers and annealing thresholds, so that every rank takes exactly the same steps."""

from __future__ import annotations

import math

import numpy as np

from sglang_eplb_affinity.domain.numba_kernel import kernel

# -ln(u) for u at the middle of 1024 equal steps, in units of 1/1024. Rounded to integers, since the last digit of a
# floating-point logarithm may differ between machines and every rank must take the same decisions.
NEG_LOG = np.array([round(-1024 * math.log((i + 0.5) / 1024)) for i in range(1024)], np.int64)


@kernel
def next_random(state):  # type: ignore[no-untyped-def]
    """The next 31 random bits as int64; state uint64 [1] (splitmix64)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> np.uint64(31))) >> np.uint64(33))


def schedule(stages: int, hot: int, cold: int) -> np.ndarray:
    """int64 [stages]: temperatures in 1/1024 of a cost unit, falling geometrically from hot to cold; 0 at the end."""
    if stages < 2:
        return np.zeros(stages, np.int64)
    ratio = math.log(max(cold, 1) / max(hot, 1)) / max(stages - 2, 1)
    return np.array([round(hot * math.exp(ratio * i)) for i in range(stages - 1)] + [0], np.int64)
