"""One layer: choose the search that fits the replicas and the dispatch rule, and run it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.planner.bitmaps import expert_bitmaps, token_lists
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.cover_search import search_cover
from sglang_eplb_affinity.planner.layout import spread_duplicates
from sglang_eplb_affinity.planner.random_steps import NEG_LOG, schedule
from sglang_eplb_affinity.planner.swap_search import search_swaps
from sglang_eplb_affinity.topology import Topology

COST_UNIT = 8  # one copy of one token to another GPU, in integer cost units
UNLIMITED = 1 << 30


@dataclass(frozen=True)
class SearchBudget:
    """How long a search runs. Temperatures are fractions of the sampled tokens that one proposal may cost."""

    tokens: int
    stages: int
    steps_per_stage: int
    hot: float
    cold: float

    def temperatures(self, num_tokens: int) -> np.ndarray:
        scale = COST_UNIT * num_tokens * 1024
        return schedule(self.stages, int(self.hot * scale), int(self.cold * scale))


@dataclass(frozen=True)
class LayerProblem:
    """counts int64 [experts]; tokens int16 [T, k]; start int32 [slots]; load_cap in counts.

    home uint8 [experts, gpus]: 1 where an expert may be without it counting as a move.
    """

    counts: np.ndarray
    tokens: np.ndarray
    start: np.ndarray
    load_cap: int
    home: np.ndarray
    move_cost: int
    max_moves: int
    seed: int


def search_layer(
    problem: LayerProblem, topology: Topology, config: PlannerConfig, budget: SearchBudget
) -> np.ndarray | None:
    """int32 [slots], or None where no GPU can be kept free of duplicate experts."""
    slots = len(problem.start)
    experts = len(problem.counts)
    slots_per_gpu = slots // topology.num_gpus
    out = problem.start.copy()
    share = config.normal_share
    gpu_weight = round(COST_UNIT * share)
    node_weight = round(COST_UNIT * share * config.node_weight) if topology.num_nodes > 1 else 0
    spread_weight = round(COST_UNIT * (1 - share) * config.node_weight) if topology.num_nodes > 1 else 0
    num_tokens = len(problem.tokens)
    move_cost = problem.move_cost * COST_UNIT * num_tokens // 1_000_000
    temperatures = budget.temperatures(num_tokens)
    replicas = np.bincount(out, minlength=experts)
    if slots == experts or (config.dispatch != "cover" and spread_weight == 0):
        if not spread_duplicates(out, slots_per_gpu, problem.counts // replicas):
            return None
        if slots == experts:
            tokens, item_expert, item_load = problem.tokens, np.arange(experts, dtype=np.int32), problem.counts
            slot_item = out
        else:
            tokens, item_expert, item_load, slot_item = split_by_replica(problem.tokens, out, problem.counts, replicas)
        start, members = token_lists(tokens, slots)
        search_swaps(
            tokens, expert_bitmaps(tokens, slots), start, members, slot_item, item_expert, item_load, slots_per_gpu,
            topology.gpus_per_node, topology.num_nodes, gpu_weight, node_weight, problem.load_cap, problem.home,
            move_cost, problem.max_moves, temperatures, NEG_LOG, budget.steps_per_stage, problem.seed,
        )  # fmt: skip
        return item_expert[slot_item]
    if not spread_duplicates(out, slots_per_gpu, problem.counts // replicas):
        return None
    bits = expert_bitmaps(problem.tokens, experts)
    members = np.bincount(problem.tokens[problem.tokens >= 0], minlength=experts)
    search_cover(
        bits, coin_bitmaps(experts, bits.shape[1]), members, problem.counts, out, slots_per_gpu,
        topology.gpus_per_node, topology.num_nodes, gpu_weight, node_weight, spread_weight, problem.load_cap,
        problem.home, move_cost, problem.max_moves, temperatures, NEG_LOG, budget.steps_per_stage, problem.seed,
    )  # fmt: skip
    return out


def coin_bitmaps(rows: int, words: int) -> np.ndarray:
    """uint64 [rows, words] of fair coins, the same everywhere (a counter-based integer hash, no generator state)."""
    z = np.arange(1, rows * words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).reshape(rows, words)


def split_by_replica(
    tokens: np.ndarray, slot_expert: np.ndarray, counts: np.ndarray, replicas: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int16 [T, k] of replica items for rules that choose a replica blindly, each replica an even share.

    Returns (tokens, item_expert int32 [slots], item_load int64 [slots], slot_item int32 [slots]).
    """
    experts = len(counts)
    order = np.argsort(slot_expert, kind="stable").astype(np.int32)
    item_expert = slot_expert[order]
    first = np.zeros(experts, np.int64)
    first[1:] = np.cumsum(replicas)[:-1]
    rows = np.arange(len(tokens), dtype=np.uint64)[:, None]
    safe = np.maximum(tokens, 0).astype(np.int64)
    mixed = (rows * np.uint64(0x9E3779B1) + safe.astype(np.uint64) * np.uint64(0x85EBCA77)) & np.uint64(0xFFFFFFFF)
    mixed = ((mixed ^ (mixed >> np.uint64(15))) * np.uint64(0x2C1B3C6D)) & np.uint64(0xFFFFFFFF)
    pick = (mixed ^ (mixed >> np.uint64(13))).astype(np.int64) % replicas[safe]
    items = np.where(tokens >= 0, first[safe] + pick, -1).astype(np.int16)
    slot_item = np.empty_like(order)
    slot_item[order] = np.arange(len(order), dtype=np.int32)
    return items, item_expert, (counts // replicas)[item_expert], slot_item
