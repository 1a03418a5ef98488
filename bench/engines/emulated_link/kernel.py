"""The Triton kernels of the emulated link: one block of one SM counts copies, then watches the GPU's clock.

Nothing waits on the host and every size is known at launch, so a CUDA graph can capture them. The count's reference is
:func:`bench.engines.emulated_link.copies.remote_copies`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 256


@triton.jit
def _now():  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )  # nanoseconds


@triton.jit
def _ones(bits):  # type: ignore[no-untyped-def]
    """How many bits of an int32 are set."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return (bits & 0xFF) + ((bits >> 8) & 0xFF) + ((bits >> 16) & 0xFF) + ((bits >> 24) & 0xFF)


@triton.jit
def _wait(copies, picoseconds_per_copy):  # type: ignore[no-untyped-def]
    until = _now() + copies * picoseconds_per_copy // 1000
    now = _now()
    while now < until:
        now = _now()


@triton.jit
def _count_and_wait(  # type: ignore[no-untyped-def]
    ids, count, num_tokens, stride, slots_per_node, own_node, picoseconds,
    K: tl.constexpr, PER_EXPERT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.int64)
    for begin in range(0, num_tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        inside = token < num_tokens
        visited = tl.zeros((BLOCK,), tl.int32)
        for j in tl.static_range(K):
            slot = tl.load(ids + token.to(tl.int64) * stride + j, mask=inside, other=-1).to(tl.int32)
            node = slot // slots_per_node
            away = (slot >= 0) & (node != own_node)
            if PER_EXPERT:
                total += away.to(tl.int64)
            else:
                visited |= tl.where(away, 1 << node, 0)
        if not PER_EXPERT:
            total += _ones(visited).to(tl.int64)
    copies = tl.sum(total, axis=0)
    tl.store(count, copies)
    _wait(copies, picoseconds)


@triton.jit
def _wait_again(count, picoseconds):  # type: ignore[no-untyped-def]
    _wait(tl.load(count), picoseconds)


def after_dispatch(
    ids: torch.Tensor, count: torch.Tensor, slots_per_node: int, own_node: int, picoseconds: int, per_expert: bool
) -> None:
    """Count the remote copies of ``ids`` int64 [tokens, k] into ``count`` int64 [1] and wait ``picoseconds`` a copy."""
    num_tokens, k = ids.shape
    _count_and_wait[(1,)](
        ids, count, num_tokens, ids.stride(0), slots_per_node, own_node, picoseconds,
        K=k, PER_EXPERT=per_expert, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def after_combine(count: torch.Tensor, picoseconds: int) -> None:
    """Wait ``picoseconds`` for each of ``count`` int64 [1] copies."""
    _wait_again[(1,)](count, picoseconds, num_warps=1)
