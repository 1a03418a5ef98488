"""Judging one layer's map on the plan sample, under the dispatch rule that the server uses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.dispatch.evaluate import NO_PASS_LOAD, NOT_KEPT, ONE_PASS, dealt_sources, measure_layer
from sglang_eplb_affinity.dispatch.rules import DispatchRule, RuleNumber
from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.config import PlannerConfig


@dataclass(frozen=True)
class Judgement:
    """``cost``: the objective in copies to another GPU per token; fan-outs per token; ``load``: max/mean over GPUs."""

    cost: float
    gpu_fanout: float
    node_fanout: float
    load: float


def worth_moving(current: Judgement, planned: Judgement, load_cap: float, minimum_gain: float) -> bool:
    """Whether a layer gains enough to move its experts; see ``PlannerConfig.minimum_gain``.

    The one rule for it, of plans, servers and simulated days. ``load_cap`` 0: load alone decides.
    """

    def gained(before: float, after: float) -> bool:
        return after < before and after <= before * (1 - minimum_gain)

    lighter = gained(current.load, planned.load)
    if current.load > load_cap:
        return lighter
    return gained(current.cost, planned.cost) or (lighter and planned.cost <= current.cost)


@kernel
def _replica_table(row, num_experts):  # type: ignore[no-untyped-def]
    """(int32 [experts, max_replicas], int32 [experts]) of one layer, as ExpertMap gives them for all."""
    replicas = np.zeros(num_experts, np.int32)
    for e in row:
        replicas[e] += 1
    table = np.full((num_experts, replicas.max()), -1, np.int32)
    filled = np.zeros(num_experts, np.int64)
    for s in range(len(row)):
        e = row[s]
        table[e, filled[e]] = s
        filled[e] += 1
    return table, replicas


def judge(
    row: np.ndarray, counts: np.ndarray, tokens: np.ndarray, topology: Topology, config: PlannerConfig
) -> Judgement:
    """The map ``row`` int32 [slots] for tokens int16 [T, k]; loads are taken from counts int64 [experts]."""
    sums, share, _ = dispatch_sample(row, len(counts), tokens, topology, config.dispatch, NOT_KEPT)
    load = (share * counts[row]).reshape(topology.num_gpus, -1).sum(1)
    gpu, node = (sums[:2] / max(len(tokens), 1)).tolist()
    return Judgement(cost_of(sums, len(tokens), topology, config), gpu, node, float(load.max() / load.mean()))


def cost_of(sums: np.ndarray, tokens: int, topology: Topology, config: PlannerConfig) -> float:
    """The objective per token, from the ``sums`` of :func:`measure_layer` over so many tokens."""
    gpu, node, _, _, copies = (sums / max(tokens, 1)).tolist()
    normal = config.normal_share
    nodes = config.node_weight if topology.num_nodes > 1 else 0
    return float(normal * (gpu + nodes * node) + (1 - normal) * nodes * copies)


def tokens_by_slot(
    tokens: np.ndarray, row: np.ndarray, num_experts: int, topology: Topology, rule: DispatchRule
) -> tuple[np.ndarray, np.ndarray]:
    """(int16 [T, k]: the slot that serves each (token, expert); float64 [slots]: each slot's share of its expert)."""
    chosen = np.full_like(tokens, -1)
    _, share, _ = dispatch_sample(row, num_experts, tokens, topology, rule, chosen)
    return chosen, share


def dispatch_sample(
    row: np.ndarray, num_experts: int, tokens: np.ndarray, topology: Topology, rule: DispatchRule, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sums int64 [5] as in :func:`measure_layer`, float64 [slots]: each slot's share of its expert's tokens, int64
    [slots]: assignments of the sample to each slot).

    Windows do not record where a token was: the sampled tokens are given to the GPUs in turn.
    """
    table, replicas = _replica_table(row, num_experts)
    slot_load = np.zeros(len(row), np.int64)
    sums = np.zeros(5, np.int64)
    source = dealt_sources(len(tokens), topology)
    measure_layer(
        tokens, source, table, replicas, len(row) // topology.num_gpus,
        topology.gpus_per_node, topology.num_nodes, int(RuleNumber.of(rule)), sums, slot_load, chosen,
        ONE_PASS, NO_PASS_LOAD,
    )  # fmt: skip
    sampled = np.bincount(row, weights=slot_load, minlength=num_experts)[row]
    return sums, np.where(sampled > 0, slot_load / np.maximum(sampled, 1), 1 / replicas[row]), slot_load
