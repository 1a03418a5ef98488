"""Judging one layer's map on the plan sample, under the dispatch rule that the server uses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sglang_eplb_affinity.dispatch.evaluate import NO_PASS_LOAD, NOT_KEPT, ONE_PASS, dealt_sources, measure_layer
from sglang_eplb_affinity.dispatch.rules import DispatchRule, RuleNumber
from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.config import PlannerConfig

BLOCKS = 16
LEAST_TOKENS = 16  # of a block, for its load to mean anything


@dataclass(frozen=True)
class Judgement:
    """``cost``: of dispatch, in copies to another GPU per token; fan-outs per token; ``load``: max/mean over GPUs.

    Of a plan, ``shift``: what its loads in earlier windows cost, in the same unit (:func:`shift_cost`); ``load_p95``:
    95th percentile of the load over blocks of the sample and earlier windows. 0 where they are not asked for.
    """

    cost: float
    gpu_fanout: float
    node_fanout: float
    load: float
    shift: float = 0.0
    load_p95: float = 0.0

    @property
    def objective(self) -> float:
        return self.cost + self.shift


@dataclass(frozen=True)
class Earlier:
    """shares float [windows, experts] of earlier windows, may be none; ``weight``: of ImbalanceWeights."""

    shares: np.ndarray
    weight: float


def worth_moving(current: Judgement, planned: Judgement, load_cap: float, minimum_gain: float) -> bool:
    """Whether a layer gains enough to move its experts; see ``PlannerConfig.minimum_gain``.

    The one rule for it, of plans, servers and simulated days. ``load_cap`` 0: load alone decides. Dispatch is weighed
    with what the loads of earlier windows cost.
    """

    def gained(before: float, after: float) -> bool:
        return after < before and after <= before * (1 - minimum_gain)

    lighter = gained(current.load, planned.load)
    if current.load > load_cap:
        return lighter
    return gained(current.objective, planned.objective) or (lighter and planned.objective <= current.objective)


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
    row: np.ndarray, counts: np.ndarray, tokens: np.ndarray, topology: Topology, config: PlannerConfig,
    earlier: Earlier | None = None,
) -> Judgement:  # fmt: skip
    """The map ``row`` int32 [slots] for tokens int16 [T, k]; loads are taken from counts int64 [experts].

    With ``earlier`` the loads of blocks and of earlier windows are judged as well.
    """
    chosen = NOT_KEPT if earlier is None else np.full_like(tokens, -1)
    sums, share, _ = dispatch_sample(row, len(counts), tokens, topology, config.dispatch, chosen)
    load = (share * counts[row]).reshape(topology.num_gpus, -1).sum(1)
    gpu, node = (sums[:2] / max(len(tokens), 1)).tolist()
    found = Judgement(cost_of(sums, len(tokens), topology, config), gpu, node, float(load.max() / load.mean()))
    if earlier is None or not len(tokens):
        return found
    now = load / load.mean()
    by_slot = (share * earlier.shares[:, row]).reshape(-1, topology.num_gpus, len(row) // topology.num_gpus)
    before = by_slot.sum(2) * topology.num_gpus
    peaks = np.concatenate([_block_loads(chosen, len(row), topology), before]).max(1)
    shift = earlier.weight * shift_cost(before - now, tokens.shape[1])
    return replace(found, shift=shift, load_p95=float(np.percentile(peaks, 95)))


def shift_cost(deviation: np.ndarray, top_k: int) -> float:
    """Of deviation float [windows, gpus] of load, in mean loads, between earlier windows and this one."""
    return float((deviation**2).mean() / top_k) if len(deviation) else 0.0


def _block_loads(chosen: np.ndarray, slots: int, topology: Topology) -> np.ndarray:
    """float64 [blocks, gpus]: load in mean loads, by blocks of tokens; chosen int16 [T, k] slots, -1 for none."""
    blocks = max(1, min(BLOCKS, len(chosen) // LEAST_TOKENS))
    cell = (
        chosen // (slots // topology.num_gpus)
        + topology.num_gpus * (np.arange(len(chosen)) * blocks // len(chosen))[:, None]
    )
    load = np.bincount(cell[chosen >= 0], minlength=blocks * topology.num_gpus).reshape(blocks, -1)
    return np.asarray(load / np.maximum(load.mean(1, keepdims=True), 1e-12))


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
