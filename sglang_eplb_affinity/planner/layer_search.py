"""One layer: choose the search that fits the replicas and the dispatch rule, and run it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sglang_eplb_affinity.planner.bitmaps import expert_bitmaps, token_lists
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.cover_search import search_cover
from sglang_eplb_affinity.planner.imbalance import Imbalance
from sglang_eplb_affinity.planner.layout import spread_duplicates
from sglang_eplb_affinity.planner.random_steps import NEG_LOG, schedule
from sglang_eplb_affinity.planner.swap_search import search_swaps
from sglang_eplb_affinity.topology import Topology

COST_UNIT = 8  # one copy of one token to another GPU, in integer cost units
UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Annealing:
    """One search. ``tokens``: how many sampled tokens it looks at. ``hot`` and ``cold``: first and last temperature, as
    the fraction of these tokens that one accepted proposal may typically cost."""

    tokens: int
    stages: int
    steps_per_stage: int
    hot: float
    cold: float

    def temperatures(self, num_tokens: int) -> np.ndarray:
        scale = COST_UNIT * num_tokens * 1024
        return schedule(self.stages, int(self.hot * scale), int(self.cold * scale))


@dataclass(frozen=True)
class SearchBudget:
    """``swaps`` moves replicas that exist; ``cover`` also chooses which experts are replicated. Either may be None."""

    swaps: Annealing | None
    cover: Annealing | None = None

    @property
    def tokens(self) -> int:
        return max(part.tokens for part in (self.swaps, self.cover) if part is not None)


@dataclass(frozen=True)
class LayerProblem:
    """counts int64 [experts]; tokens int16 [T, k]; start int32 [slots]; load_cap in counts.

    home uint8 [experts, gpus]: 1 where an expert may be without it counting as a move.
    """

    counts: np.ndarray
    tokens: np.ndarray
    start: np.ndarray
    load_cap: int
    imbalance: Imbalance
    home: np.ndarray
    move_cost: int
    max_moves: int
    seed: int


@dataclass(frozen=True)
class Weights:
    """Integer costs of one token's copy to a GPU, to a node, and of one expert copy to a node (low latency)."""

    gpu: int
    node: int
    spread: int

    @staticmethod
    def of(config: PlannerConfig, topology: Topology) -> Weights:
        share = config.normal_share
        nodes = config.node_weight if topology.num_nodes > 1 else 0
        return Weights(
            round(COST_UNIT * share), round(COST_UNIT * share * nodes), round(COST_UNIT * (1 - share) * nodes)
        )


def search_layer(
    problem: LayerProblem, topology: Topology, config: PlannerConfig, budget: SearchBudget
) -> np.ndarray | None:
    """int32 [slots], or None where no GPU can be kept free of duplicate experts."""
    slots = len(problem.start)
    experts = len(problem.counts)
    out = problem.start.copy()
    replicas = np.bincount(out, minlength=experts)
    if not spread_duplicates(out, slots // topology.num_gpus, problem.counts // replicas):
        return None
    weights = Weights.of(config, topology)
    if budget.swaps is not None:
        out = _swaps(problem, out, replicas, topology, weights, budget.swaps)
    if budget.cover is not None:
        _cover(problem, out, topology, weights, budget.cover)
    return out


def _move_cost(problem: LayerProblem, num_tokens: int) -> int:
    return problem.move_cost * COST_UNIT * num_tokens // 1_000_000


def _swaps(
    problem: LayerProblem, slot_expert: np.ndarray, replicas: np.ndarray, topology: Topology, weights: Weights,
    annealing: Annealing,
) -> np.ndarray:  # fmt: skip
    slots = len(slot_expert)
    tokens = thin(problem.tokens, annealing.tokens)
    profile = problem.imbalance.block_profile
    if slots == len(problem.counts):
        item_expert, item_load, slot_item = np.arange(slots, dtype=np.int32), problem.counts, slot_expert.copy()
    else:
        tokens, item_expert, item_load, slot_item = split_by_replica(tokens, slot_expert, problem.counts, replicas)
        profile = profile[item_expert] // replicas[item_expert][:, None].astype(np.int32)
    start, members = token_lists(tokens, slots)
    search_swaps(
        tokens, expert_bitmaps(tokens, slots), start, members, slot_item, item_expert, item_load,
        slots // topology.num_gpus, topology.gpus_per_node, topology.num_nodes, weights.gpu, weights.node,
        problem.load_cap, problem.imbalance.load_free, problem.imbalance.load_scale, profile, len(tokens),
        problem.home, _move_cost(problem, len(tokens)), problem.max_moves, annealing.temperatures(len(tokens)), NEG_LOG,
        annealing.steps_per_stage, problem.seed,
    )  # fmt: skip
    return item_expert[slot_item]


def _cover(
    problem: LayerProblem, slot_expert: np.ndarray, topology: Topology, weights: Weights, annealing: Annealing
) -> None:
    tokens = thin(problem.tokens, annealing.tokens)
    experts = len(problem.counts)
    bits = expert_bitmaps(tokens, experts)
    search_cover(
        bits, coin_bitmaps(experts, bits.shape[1]), np.bincount(tokens[tokens >= 0], minlength=experts), problem.counts,
        slot_expert, len(slot_expert) // topology.num_gpus, topology.gpus_per_node, topology.num_nodes, weights.gpu,
        weights.node, weights.spread, problem.load_cap, problem.imbalance.load_free,
        problem.imbalance.load_scale, problem.imbalance.block_profile, len(tokens), problem.home,
        _move_cost(problem, len(tokens)), problem.max_moves, annealing.temperatures(len(tokens)), NEG_LOG,
        annealing.steps_per_stage, problem.seed,
    )  # fmt: skip


def thin(tokens: np.ndarray, limit: int) -> np.ndarray:
    """``limit`` rows spread evenly over tokens [T, k], or all."""
    if len(tokens) <= limit:
        return tokens
    return np.ascontiguousarray(tokens[np.arange(limit) * len(tokens) // limit])


@lru_cache(maxsize=8)
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
