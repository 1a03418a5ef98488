"""How many copies of its tokens a GPU sends to other nodes, and how large they are."""

from __future__ import annotations

import torch

SCALE_BLOCK = 128  # hidden values for each FP8 scale


def remote_copies(ids: torch.Tensor, slots_per_node: int, own_node: int, per_expert: bool) -> torch.Tensor:
    """int64 [1]: the reference of the kernel.

    ``ids`` int64 [tokens, k]: physical expert slots of this GPU's tokens, negative where there is none (padding).
    DeepEP's normal mode sends a token once to each other node that has an expert of it; low latency
    (``per_expert``) sends it once for each expert on another node.
    """
    node = torch.where(ids >= 0, ids // slots_per_node, own_node)
    if per_expert:
        return (node != own_node).sum().reshape(1)
    nodes = int(node.max()) + 1 if node.numel() else 1
    visited = torch.zeros((len(ids), max(nodes, own_node + 1)), dtype=torch.bool, device=ids.device)
    visited.scatter_(1, node, True)
    visited[:, own_node] = False
    return visited.sum().reshape(1)


def dispatch_bytes(hidden: int, top_k: int, fp8: bool, per_expert: bool) -> int:
    """Of one copy on its way to the experts: hidden values (FP8 with a float32 scale a block, else bf16) and what goes
    along: ids (int64) and weights (float32) of all choices in normal mode, 16 bytes in low latency."""
    values = hidden + 4 * (hidden // SCALE_BLOCK) if fp8 else 2 * hidden
    return values + (16 if per_expert else 12 * top_k)


def combine_bytes(hidden: int, top_k: int, per_expert: bool) -> int:
    """Of one copy on its way back: bf16; in normal mode with the weights of all choices."""
    return 2 * hidden + (0 if per_expert else 4 * top_k)
