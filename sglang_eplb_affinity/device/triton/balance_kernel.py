"""What `cover_balanced` adds to `cover` in Triton: a pass's load and ties per GPU, and the weights made from them.

A pass that fits one program is counted in its registers. A larger one is launched twice: the first launch counts, by
integer atomics into a workspace, and the second makes the weights from it and chooses. The last program of the second
launch to finish empties the workspace for the next pass.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from sglang_eplb_affinity.dispatch.rules import EVEN_WEIGHT, MOST_WEIGHT

NO_STAGE, COUNT, CHOOSE, BOTH = range(4)  # what a launch does: nothing of it, the first half, the second, all
TICKET_INTS = 32  # a line of its own for the count of programs that are done

_EVEN = tl.constexpr(EVEN_WEIGHT)
_MOST = tl.constexpr(MOST_WEIGHT)
_TICKET = tl.constexpr(TICKET_INTS)


@triton.jit
def _bins(slots, tied, SLOTS_PER_GPU: tl.constexpr, GPU_BINS: tl.constexpr):
    """[items]: the GPU of each choice, and of one that had other candidates GPU_BINS more."""
    found = tl.maximum(slots, 0) // SLOTS_PER_GPU + tied * GPU_BINS
    return tl.reshape(found, [found.numel])


@triton.jit
def pass_counts(slots, tied, counted, SLOTS_PER_GPU: tl.constexpr, GPU_BINS: tl.constexpr):
    """int32 [2 * GPU_BINS] of a pass that is in one program."""
    bins = _bins(slots, tied, SLOTS_PER_GPU, GPU_BINS)
    return tl.histogram(bins, 2 * GPU_BINS, mask=tl.reshape(counted, [counted.numel]))


@triton.jit
def add_to_pass(
    balance, slots, tied, counted, SLOTS_PER_GPU: tl.constexpr, GPU_BINS: tl.constexpr, IN_BLOCK: tl.constexpr
):
    """Add a block's choices to the workspace; IN_BLOCK: added up in the block first."""
    if IN_BLOCK:
        added = pass_counts(slots, tied, counted, SLOTS_PER_GPU, GPU_BINS)
        tl.atomic_add(balance + _TICKET + tl.arange(0, 2 * GPU_BINS), added, mask=added > 0, sem="relaxed")
    else:
        bins = _bins(slots, tied, SLOTS_PER_GPU, GPU_BINS)
        flat = tl.reshape(counted, [counted.numel])
        tl.atomic_add(balance + _TICKET + bins, bins * 0 + 1, mask=flat, sem="relaxed")


@triton.jit
def load_counts(balance, GPU_BINS: tl.constexpr):
    """int32 [2 * GPU_BINS] of a pass that was counted by another launch."""
    return tl.load(balance + _TICKET + tl.arange(0, 2 * GPU_BINS))


@triton.jit
def weights_of(counts, GPUS: tl.constexpr, GPU_BINS: tl.constexpr):
    """uint32 [GPU_BINS]: rules.tie_weights of counts int32 [2 * GPU_BINS]."""
    by_tie = tl.reshape(counts, [2, GPU_BINS])
    load = tl.sum(by_tie, 0)
    ties = tl.sum(tl.where(tl.arange(0, 2)[:, None] == 1, by_tie, 0), 0)
    mean = (tl.sum(load, 0) + (GPUS - 1)) // GPUS
    wanted = tl.maximum(ties + mean - load, 0).to(tl.int64)
    weights = wanted * _EVEN // tl.maximum(ties, 1)
    return tl.minimum(tl.maximum(weights, 1), _MOST).to(tl.uint32)


@triton.jit
def weight_of_slot(gpu_weights, slot, SLOTS_PER_GPU: tl.constexpr):
    """uint32, of the shape of ``slot``: its GPU's weight; anything for -1."""
    gpu = tl.maximum(slot, 0) // SLOTS_PER_GPU
    return tl.reshape(tl.gather(gpu_weights, tl.reshape(gpu, [gpu.numel]), 0), gpu.shape)


@triton.jit
def empty_when_last(balance, GPU_BINS: tl.constexpr):
    """The last program that comes here empties the workspace."""
    tl.debug_barrier()
    if tl.atomic_add(balance, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(balance + _TICKET + tl.arange(0, 2 * GPU_BINS), tl.zeros([2 * GPU_BINS], tl.int32))
        tl.store(balance, 0)
