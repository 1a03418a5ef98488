"""The Triton kernel of forced routing; its reference is :func:`forced_routing.reference_ids`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _write_ids(rows, start, ids, num_rows, num_tokens, stride_token, K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = item // K
    slot = item % K
    inside = token < num_tokens
    begin = (tl.load(start) % num_rows).to(tl.int32)  # one 64-bit division; the rest is 32 bits
    row = (begin + token) % num_rows
    expert = tl.load(rows + row * K + slot, mask=inside)
    tl.store(ids + token.to(tl.int64) * stride_token + slot, expert.to(ids.dtype.element_ty), mask=inside)


def write_ids(rows: torch.Tensor, start: torch.Tensor, topk_ids: torch.Tensor) -> None:
    """``rows`` int16 [rows, k] contiguous, ``start`` int64 [1], ``topk_ids`` int32 or int64 [tokens >= 1, >= k]."""
    num_rows, k = rows.shape
    num_tokens = topk_ids.shape[0]
    grid = (triton.cdiv(num_tokens * k, _BLOCK),)
    _write_ids[grid](rows, start, topk_ids, num_rows, num_tokens, topk_ids.stride(0), K=k, BLOCK=_BLOCK, num_warps=4)
