"""Which replica serves a (token, logical expert): the rules ``cover``, ``dynamic`` and ``static``, in plain torch.

These are the references that kernels must equal bit for bit. All take ``topk_ids`` [tokens, k] (logical ids, -1 for
padding) and give physical ids of the same shape and dtype (-1 stays -1).

``cover``, per token:

1. Experts with one replica have no choice; their GPUs and nodes are "visited".
2. Replicated experts follow in top-k order. The candidates are the first of these sets that is not empty: replicas on
   a visited GPU, on a visited node, on the source GPU, on the source node, all. Of n candidates in rising slot order
   number ``replica_hash(row, expert) % n`` is taken, and its GPU and node become visited.

``dynamic`` takes number ``replica_hash(row, expert) % n`` of all n replicas: even spreading, as EPLB assumes.
``static`` depends on the source only: a replica on the source GPU, else one on its node, else any. Where several could
be taken, the source GPUs that have the same choice are dealt out to them in turn, from number ``expert % n`` on, so
that each replica serves as many of them as any other, or one more. SGLang deals with a seeded shuffle, and sends a
whole node to the first of its replicas.

Without a source (no all-to-all backend: every rank runs all tokens and must choose alike) pass ``source_gpu=None``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Literal

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology

if TYPE_CHECKING:
    import torch

DispatchRule = Literal["cover", "static", "dynamic"]
DISPATCH_RULES: tuple[DispatchRule, ...] = ("cover", "static", "dynamic")


class RuleNumber(IntEnum):
    """How compiled code, numba's and Triton's, tells the rules apart; 0 is no rule."""

    STATIC = 1
    DYNAMIC = 2
    COVER = 3

    @staticmethod
    def of(rule: DispatchRule) -> RuleNumber:
        """Raises InputError for a rule that there is not."""
        if rule not in DISPATCH_RULES:
            raise InputError(f"dispatch rule {rule!r} is not one of {', '.join(DISPATCH_RULES)}")
        return RuleNumber[rule.upper()]


def replica_hash(row: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """int64 in [0, 2**32): a multiplicative hash of token row and logical expert (uint32 arithmetic)."""
    mask = 0xFFFFFFFF
    h = (row.long() * 0x9E3779B1 + expert.long() * 0x85EBCA77) & mask
    h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & mask
    return h ^ (h >> 13)


def choose_replicas(
    topk_ids: torch.Tensor,
    logical_to_all_physical: torch.Tensor,
    topology: Topology,
    num_slots: int,
    rule: DispatchRule,
    source_gpu: torch.Tensor | int | None = None,
    first_row: int = 0,
) -> torch.Tensor:
    """Physical ids [tokens, k] for one layer.

    ``logical_to_all_physical`` [experts, max_replicas] lists slots in rising order, padded with -1 (one layer of
    :meth:`ExpertMap.logical_to_all_physical`). ``source_gpu`` is one rank, or int [tokens]; ``first_row`` is the row
    number of the first token, for callers that go in chunks.
    """
    import torch

    RuleNumber.of(rule)
    device = topk_ids.device
    tokens = topk_ids.shape[0]
    table = logical_to_all_physical.to(device).long()
    slots_per_gpu = topology.slots_per_gpu(num_slots)
    row = torch.arange(first_row, first_row + tokens, device=device)[:, None]
    ids = topk_ids.long()
    used = ids >= 0
    safe = ids.clamp(min=0)
    replicas = table[safe]  # [tokens, k, max_replicas]
    valid = replicas >= 0
    gpu = torch.where(valid, replicas, 0) // slots_per_gpu
    node = gpu // topology.gpus_per_node
    number = replica_hash(row, safe)
    if isinstance(source_gpu, int):  # made on the device, so that a CUDA graph can capture it
        source_gpu = torch.full((), source_gpu, device=device)
    source = None if source_gpu is None else torch.as_tensor(source_gpu, device=device).long().expand(tokens)[:, None]

    if rule == "dynamic":
        choice = _nth(valid, number % valid.sum(-1))
    elif rule == "static":
        choice = _choose_static(valid, table, safe, source, topology, slots_per_gpu, number)
    else:
        choice = _choose_cover(valid, gpu, node, used, source, topology, number)
    physical = replicas.gather(-1, choice[..., None])[..., 0]
    return torch.where(used, physical, -1).to(topk_ids.dtype)


def _nth(candidates: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Index along the last axis of the n-th True of ``candidates`` [..., replicas]."""
    return ((candidates.cumsum(-1) == (n + 1)[..., None]) & candidates).int().argmax(-1)


def _choose_static(valid, table, ids, source, topology, slots_per_gpu, number):  # type: ignore[no-untyped-def]
    if source is None:
        return _nth(valid, number % valid.sum(-1))
    return _static_choices(table, topology, slots_per_gpu)[source, ids]


def _static_choices(table: torch.Tensor, topology: Topology, slots_per_gpu: int) -> torch.Tensor:
    """int64 [gpus, experts]: the replica that each GPU uses, as column of ``table`` [experts, max_replicas]."""
    import torch

    valid = table >= 0
    gpu = torch.where(valid, table, 0) // slots_per_gpu
    ranks = torch.arange(topology.num_gpus, device=table.device)
    of_rank = ranks // topology.gpus_per_node
    own = valid & (gpu == ranks[:, None, None])  # [gpus, experts, max_replicas]
    near = valid & (gpu // topology.gpus_per_node == of_rank[:, None, None])
    candidates = torch.where(near.any(-1, keepdim=True), near, valid)
    # GPUs with the same choice: those of a node with a replica, or those of all nodes without one.
    group = torch.where(near.any(-1), of_rank[:, None], topology.num_nodes)
    waits = ~own.any(-1)
    before = (group[:, None] == group[None]) & waits[None] & (ranks[None] < ranks[:, None])[..., None]
    turn = before.sum(1) + torch.arange(len(table), device=table.device)
    dealt = _nth(candidates, turn % candidates.sum(-1).clamp(min=1))
    return torch.where(waits, dealt, own.int().argmax(-1))


def _choose_cover(valid, gpu, node, used, source, topology, number):  # type: ignore[no-untyped-def]
    import torch

    tokens, k, _ = valid.shape
    count = valid.sum(-1)
    visited_gpu = torch.zeros(tokens, topology.num_gpus + 1, dtype=torch.bool, device=valid.device)
    visited_node = torch.zeros(tokens, topology.num_nodes + 1, dtype=torch.bool, device=valid.device)
    pinned = used & (count == 1)
    # The last column takes what must not count.
    visited_gpu.scatter_(1, torch.where(pinned, gpu[..., 0], topology.num_gpus), True)
    visited_node.scatter_(1, torch.where(pinned, node[..., 0], topology.num_nodes), True)
    choice = torch.zeros(tokens, k, dtype=torch.long, device=valid.device)
    for j in range(k):
        steps = [visited_gpu.gather(1, gpu[:, j]), visited_node.gather(1, node[:, j])]
        if source is not None:
            steps += [gpu[:, j] == source, node[:, j] == source // topology.gpus_per_node]
        candidates = valid[:, j]
        for step in reversed(steps):
            narrowed = valid[:, j] & step
            candidates = torch.where(narrowed.any(-1, keepdim=True), narrowed, candidates)
        choice[:, j] = _nth(candidates, number[:, j] % candidates.sum(-1))
        mark = used[:, j]
        chosen_gpu = gpu[:, j].gather(1, choice[:, j : j + 1])
        visited_gpu.scatter_(1, torch.where(mark[:, None], chosen_gpu, topology.num_gpus), True)
        chosen_node = chosen_gpu // topology.gpus_per_node
        visited_node.scatter_(1, torch.where(mark[:, None], chosen_node, topology.num_nodes), True)
    return choice


def dispatch_trace(
    topk_ids: np.ndarray, expert_map: ExpertMap, topology: Topology, rule: DispatchRule, source_gpu: np.ndarray | None
) -> np.ndarray:
    """Physical ids [tokens, layers, k] of a whole trace; for tests and small traces (evaluate.py is the fast way)."""
    import torch

    table = torch.from_numpy(expert_map.logical_to_all_physical())
    source = None if source_gpu is None else torch.from_numpy(source_gpu)
    layers = [
        choose_replicas(
            torch.from_numpy(np.ascontiguousarray(topk_ids[:, layer])), table[layer], topology, expert_map.num_slots,
            rule, source,
        ).numpy()
        for layer in range(expert_map.num_layers)
    ]  # fmt: skip
    return np.stack(layers, axis=1)
