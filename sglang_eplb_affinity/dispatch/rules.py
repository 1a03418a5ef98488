"""Which replica serves a (token, logical expert), by each of the rules that there are.

These are the references, in torch, that kernels must equal bit for bit. All take ``topk_ids`` [tokens, k] (logical ids,
-1 for padding) and give physical ids of the same shape and dtype. What is no expert's id stays what it is: -1, and ids
from the number of experts on (LongCat-Flash's zero experts, which have no weights).

``cover``, per token:

1. Experts with one replica have no choice; their GPUs and nodes are "visited".
2. Replicated experts follow in top-k order. The candidates are the first of these sets that is not empty: replicas on
   a visited GPU, on a visited node, on the source GPU, on the source node, all. Of n candidates in rising slot order
   number ``replica_hash(row, expert, source) % n`` is taken, and its GPU and node become visited.

``cover_balanced`` sees its pass, the tokens of one source. It chooses as ``cover`` does and counts, per GPU, the pass's
load and its ties: choices of this GPU that had other candidates. Then it chooses again, from the same sets of
candidates, in proportion to weights by which ties, which cost nothing, would bring every GPU to the mean load
(:func:`tie_weights`; one step of iterative proportional fitting). So fan-out stays that of ``cover``. Every source
balances its own tokens and asks no other; in integers, so the result does not depend on any order.

``dynamic`` takes number ``replica_hash(row, expert, source) % n`` of all n replicas: even spreading, as EPLB assumes.
``static`` depends on the source only: a replica on the source GPU, else one on its node, else any. Where several could
be taken, the source GPUs that have the same choice are dealt out to them in turn, from number ``expert % n`` on, so
that each replica serves as many of them as any other, or one more. SGLang deals with a seeded shuffle, and sends a
whole node to the first of its replicas.

``primary`` is ``static`` among few replicas: each expert's primary slot and ``further_slots`` of each GPU
(primaries.py). A server that is asked for it does so in small passes, and follows LARGE_PASS_RULE in others, or
``static`` where those are of DeepEP's low-latency mode.

The hash mixes the source in, or all ranks, whose rows have the same numbers, would deviate to the same side. Without a
source (no all-to-all backend: every rank runs all tokens and must choose alike) pass ``source_gpu=None``.
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

DispatchRule = Literal["cover", "cover_balanced", "static", "dynamic", "primary"]
DISPATCH_RULES: tuple[DispatchRule, ...] = ("cover", "cover_balanced", "static", "dynamic", "primary")
# Those that are kernels of their own; ``primary`` is ``static`` with fewer replicas. Placements are planned for these.
KERNEL_RULES: tuple[DispatchRule, ...] = ("cover", "cover_balanced", "static", "dynamic")
COVER_RULES: tuple[DispatchRule, ...] = ("cover", "cover_balanced")  # those that look at the token's other experts
# What SGLang does not have: chosen here, whichever algorithm plans.
OWN_RULES: tuple[DispatchRule, ...] = (*COVER_RULES, "primary")
LARGE_PASS_RULE: DispatchRule = "cover_balanced"
EVEN_WEIGHT, MOST_WEIGHT = 4096, 65535


class RuleNumber(IntEnum):
    """How compiled code, numba's and Triton's, tells the rules apart; 0 is no rule."""

    STATIC = 1
    DYNAMIC = 2
    COVER = 3
    COVER_BALANCED = 4

    @staticmethod
    def of(rule: DispatchRule) -> RuleNumber:
        """Raises InputError for a rule that there is not; ``primary`` has none (rule_tables.tables_of_rule)."""
        if rule not in KERNEL_RULES:
            raise InputError(f"dispatch rule {rule!r} is not one of {', '.join(KERNEL_RULES)}")
        return RuleNumber[rule.upper()]


def planned_rule(rule: DispatchRule) -> DispatchRule:
    """The rule that a placement is planned for: what load and traffic depend on, which small passes do not."""
    return LARGE_PASS_RULE if rule == "primary" else rule


def replica_hash(row: torch.Tensor, expert: torch.Tensor, source: torch.Tensor | None) -> torch.Tensor:
    """int64 in [0, 2**32): a multiplicative hash of token row, logical expert and source GPU (uint32 arithmetic)."""
    mask = 0xFFFFFFFF
    h = row.long() * 0x9E3779B1 + expert.long() * 0x85EBCA77
    h = (h if source is None else h + (source.long() + 1) * 0xC2B2AE3D) & mask
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
    further_slots: int = 0,
) -> torch.Tensor:
    """Physical ids [tokens, k] for one layer, whose tokens are one pass.

    ``logical_to_all_physical`` [experts, max_replicas] lists slots in rising order, padded with -1 (one layer of
    :meth:`ExpertMap.logical_to_all_physical`). ``source_gpu`` is one rank, or int [tokens]; ``first_row`` is the row
    number of the first token, for callers that go in chunks. ``further_slots``: of each GPU, under ``primary``.
    """
    import torch

    RuleNumber.of("static" if rule == "primary" else rule)
    device = topk_ids.device
    tokens = topk_ids.shape[0]
    table = logical_to_all_physical.to(device).long()
    if rule == "primary":
        from sglang_eplb_affinity.dispatch.primaries import active_replicas  # needs numba

        active = active_replicas(table[None].numpy(force=True), topology, num_slots, further_slots)[0]
        table = torch.from_numpy(active).to(device).long()
    slots_per_gpu = topology.slots_per_gpu(num_slots)
    row = torch.arange(first_row, first_row + tokens, device=device)[:, None]
    ids = topk_ids.long()
    used = (ids >= 0) & (ids < len(table))
    safe = torch.where(used, ids, 0)
    replicas = table[safe]  # [tokens, k, max_replicas]
    valid = replicas >= 0
    gpu = torch.where(valid, replicas, 0) // slots_per_gpu
    node = gpu // topology.gpus_per_node
    if isinstance(source_gpu, int):  # made on the device, so that a CUDA graph can capture it
        source_gpu = torch.full((), source_gpu, device=device)
    source = None if source_gpu is None else torch.as_tensor(source_gpu, device=device).long().expand(tokens)[:, None]
    number = replica_hash(row, safe, source)

    if rule == "dynamic":
        choice = _nth(valid, number % valid.sum(-1))
    elif rule in ("static", "primary"):
        choice = _choose_static(valid, table, safe, source, topology, slots_per_gpu, number)
    else:
        choice, tied = _choose_cover(valid, gpu, node, used, source, topology, number)
        if rule == "cover_balanced":
            weights = _weights_of_pass(gpu.gather(-1, choice[..., None])[..., 0], tied, used, source, topology.num_gpus)
            choice, _ = _choose_cover(valid, gpu, node, used, source, topology, number, weights)
    physical = replicas.gather(-1, choice[..., None])[..., 0]
    return torch.where(used, physical, ids).to(topk_ids.dtype)


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


def tie_weights(load: torch.Tensor, ties: torch.Tensor) -> torch.Tensor:
    """int64 [..., gpus]: EVEN_WEIGHT times what a GPU should get of ties over what it got, 1 to MOST_WEIGHT.

    ``load`` and ``ties`` int64 [..., gpus]: token-expert assignments of each GPU in a pass, and those that other
    candidates could have had.
    """
    gpus = load.shape[-1]
    mean = (load.sum(-1, keepdim=True) + gpus - 1) // gpus
    wanted = (ties + mean - load).clamp(min=0)
    return (EVEN_WEIGHT * wanted // ties.clamp(min=1)).clamp(1, MOST_WEIGHT)


def _weights_of_pass(gpu, tied, used, source, num_gpus):  # type: ignore[no-untyped-def]
    """int64 [1 or tokens, gpus]: :func:`tie_weights` of each token's pass, the tokens of its source."""
    import torch

    alone = source is None or source.stride(0) == 0  # one source for all, which a CUDA graph can capture
    passes = 1 if alone else num_gpus
    at = gpu if alone else source * num_gpus + gpu
    counts = torch.zeros(2, passes * num_gpus + 1, dtype=torch.long, device=gpu.device)
    for count, counted in zip(counts, (used, used & tied), strict=True):
        ones = torch.ones_like(at).flatten()
        count.scatter_add_(0, torch.where(counted, at, passes * num_gpus).flatten(), ones)
    load, ties = counts[:, :-1].view(2, passes, num_gpus)
    weights = tie_weights(load, ties)
    return weights if alone else weights[source[:, 0]]


def _choose_cover(valid, gpu, node, used, source, topology, number, weights=None):  # type: ignore[no-untyped-def]
    """(choice, whether there were other candidates) [tokens, k]; ``weights`` [1 or tokens, gpus] of the candidates."""
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
    tied = torch.zeros(tokens, k, dtype=torch.bool, device=valid.device)
    for j in range(k):
        steps = [visited_gpu.gather(1, gpu[:, j]), visited_node.gather(1, node[:, j])]
        if source is not None:
            steps += [gpu[:, j] == source, node[:, j] == source // topology.gpus_per_node]
        candidates = valid[:, j]
        for step in reversed(steps):
            narrowed = valid[:, j] & step
            candidates = torch.where(narrowed.any(-1, keepdim=True), narrowed, candidates)
        size = candidates.sum(-1)
        tied[:, j] = size > 1
        if weights is None:
            choice[:, j] = _nth(candidates, number[:, j] % size)
        else:
            weight = torch.where(candidates, weights.expand(tokens, -1).gather(1, gpu[:, j]), 0).cumsum(-1)
            drawn = number[:, j] * weight[:, -1] >> 32
            choice[:, j] = (weight > drawn[:, None]).int().argmax(-1)
        mark = used[:, j]
        chosen_gpu = gpu[:, j].gather(1, choice[:, j : j + 1])
        visited_gpu.scatter_(1, torch.where(mark[:, None], chosen_gpu, topology.num_gpus), True)
        chosen_node = chosen_gpu // topology.gpus_per_node
        visited_node.scatter_(1, torch.where(mark[:, None], chosen_node, topology.num_nodes), True)
    return choice, tied


def dispatch_trace(
    topk_ids: np.ndarray, expert_map: ExpertMap, topology: Topology, rule: DispatchRule,
    source_gpu: np.ndarray | None, further_slots: int = 0,
) -> np.ndarray:  # fmt: skip
    """Physical ids [tokens, layers, k] of a whole trace; for tests and small traces (evaluate.py is the fast way)."""
    import torch

    table = torch.from_numpy(expert_map.logical_to_all_physical())
    source = None if source_gpu is None else torch.from_numpy(source_gpu)
    layers = [
        choose_replicas(
            torch.from_numpy(np.ascontiguousarray(topk_ids[:, layer])), table[layer], topology, expert_map.num_slots,
            rule, source, further_slots=further_slots,
        ).numpy()
        for layer in range(expert_map.num_layers)
    ]  # fmt: skip
    return np.stack(layers, axis=1)
