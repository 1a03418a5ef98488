"""One layer: run the search that the budget asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.bitmaps import expert_bitmaps, token_lists
from sglang_eplb_affinity.planner.budget import COST_UNIT, REDEAL_SHARE, Annealing, SearchBudget
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.judge import tokens_by_slot
from sglang_eplb_affinity.planner.layer_problem import LayerProblem
from sglang_eplb_affinity.planner.layout import without_duplicates
from sglang_eplb_affinity.planner.numbering import numbering
from sglang_eplb_affinity.planner.random_steps import NEG_LOG
from sglang_eplb_affinity.planner.replica_search import search_replicas
from sglang_eplb_affinity.planner.replica_steps import adapt_replicas
from sglang_eplb_affinity.planner.search_arguments import Balance, Costs, Grid, Items, Moves, Steps
from sglang_eplb_affinity.planner.survival import Survive, unit_gpus, with_survivors
from sglang_eplb_affinity.planner.swap_search import search_swaps
from sglang_eplb_affinity.planner.token_service import sample_of


@dataclass(frozen=True)
class _Weights:
    """Integer costs of a token's copy to a GPU, to a node, and of one expert copy to a node (low latency)."""

    gpu: int
    node: int
    spread: int

    @staticmethod
    def of(config: PlannerConfig, topology: Topology) -> _Weights:
        share = config.normal_share
        nodes = config.node_weight if topology.num_nodes > 1 else 0
        return _Weights(
            round(COST_UNIT * share), round(COST_UNIT * share * nodes), round(COST_UNIT * (1 - share) * nodes)
        )


def search_layer(problem: LayerProblem, topology: Topology, config: PlannerConfig, budget: SearchBudget) -> np.ndarray:
    """int32 [slots]: what the search makes of the start; no GPU holds an expert twice."""
    out = without_duplicates(problem.start, problem.counts, topology)
    if not config.keeps_current:
        out = with_survivors(out, problem.counts, topology, config.survive)
    replicas = np.bincount(out, minlength=len(problem.counts))
    if problem.adapts_replicas and len(out) > len(replicas):
        adapt_replicas(
            out, problem.counts, len(out) // topology.num_gpus, problem.load_cap, problem.home, problem.max_moves
        )
    weights = _Weights.of(config, topology)
    annealing = budget.annealing
    steps = max(1, round(annealing.steps_per_stage * problem.steps_share))
    annealing = replace(annealing, steps_per_stage=steps, hot=max(annealing.hot * problem.hot_share, annealing.cold))
    tokens = thin(problem.tokens, annealing.tokens)
    temperatures = annealing.temperatures(tokens.size / len(problem.counts))
    if budget.replicas:
        _choose_replicas(problem, out, tokens, topology, config.survive, weights, annealing, temperatures)
        return out
    last = temperatures[-round(REDEAL_SHARE * len(temperatures)) :]
    for number in range(1 + budget.redeals):
        by_slot, share = tokens_by_slot(tokens, out, len(problem.counts), topology, config.dispatch)
        again = replace(problem, seed=problem.seed + (number << 50))
        out = _move_slots(again, out, by_slot, share, topology, weights, annealing, last if number else temperatures)
    return out


def _move_slots(
    problem: LayerProblem, slot_expert: np.ndarray, by_slot: np.ndarray, share: np.ndarray, topology: Topology,
    weights: _Weights, annealing: Annealing, temperatures: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Swap what the slots hold; each replica keeps the tokens that the dispatch rule sends it before the search."""
    slots = len(slot_expert)
    item_load = np.rint(share * problem.counts[slot_expert]).astype(np.int64)
    profile = np.rint(share[:, None] * problem.imbalance.profile[slot_expert]).astype(np.int32)
    slot_item = np.arange(slots, dtype=np.int32)
    start, members = token_lists(by_slot, slots)
    balance = problem.imbalance
    search_swaps(
        slot_item,
        Items(by_slot, expert_bitmaps(by_slot, slots), start, members, slot_expert, item_load),
        Grid(slots // topology.num_gpus, topology.gpus_per_node, topology.num_nodes),
        Costs(weights.gpu, weights.node, 0, _move_cost(problem, by_slot)),
        Balance(problem.load_cap, balance.load_free, balance.load_scale, profile, len(by_slot)),
        Moves(problem.home, problem.max_moves, 0),
        Steps(temperatures, NEG_LOG, annealing.steps_per_stage, problem.seed),
    )
    return slot_expert[slot_item]


def _choose_replicas(
    problem: LayerProblem, slot_expert: np.ndarray, tokens: np.ndarray, topology: Topology, survive: Survive,
    weights: _Weights, annealing: Annealing, temperatures: np.ndarray,
) -> None:  # fmt: skip
    """Improve ``slot_expert`` in place: places, and which experts have replicas."""
    given = problem.imbalance
    grid = Grid(len(slot_expert) // topology.num_gpus, topology.gpus_per_node, topology.num_nodes)
    costs = Costs(weights.gpu, weights.node, weights.spread, _move_cost(problem, tokens))
    balance = Balance(problem.load_cap, given.load_free, given.load_scale, given.profile, len(tokens))
    moves = Moves(problem.home, problem.max_moves, unit_gpus(survive, topology))
    steps = Steps(temperatures, NEG_LOG, annealing.steps_per_stage, problem.seed)
    names = numbering(topology.num_gpus, topology.num_nodes)
    search_replicas(
        sample_of(tokens, problem.counts, names.classes), slot_expert, names, grid, costs, balance, moves, steps
    )


def _move_cost(problem: LayerProblem, tokens: np.ndarray) -> int:
    return problem.move_cost * COST_UNIT * len(tokens) // 1_000_000


def thin(tokens: np.ndarray, limit: int) -> np.ndarray:
    """``limit`` rows spread evenly over tokens [T, k], or all."""
    if len(tokens) <= limit:
        return tokens
    return np.ascontiguousarray(tokens[np.arange(limit) * len(tokens) // limit])
