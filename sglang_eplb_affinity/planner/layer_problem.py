"""What a search of one layer is given."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.budget import COST_UNIT, SearchBudget
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.imbalance import Imbalance, imbalance

UNLIMITED = 1 << 30


@dataclass(frozen=True)
class LayerProblem:
    """counts int64 [experts]; tokens int16 [T, k]; start int32 [slots]; load_cap in counts.

    home uint8 [experts, gpus]: 1 where an expert may be without it counting as a move; ``move_cost`` in copies to
    another GPU per million tokens; ``max_moves`` per GPU; ``hot_share``: factor of the first temperature;
    ``steps_share``: of the budget's proposals; ``adapts_replicas``: slots of replicas take other experts first while a
    GPU is loaded over the cap.
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
    hot_share: float = 1.0
    steps_share: float = 1.0
    adapts_replicas: bool = False


def problem_of(
    counts: np.ndarray, tokens: np.ndarray, eplb: np.ndarray, current: np.ndarray | None, topology: Topology,
    config: PlannerConfig, budget: SearchBudget, layer: int, earlier: np.ndarray | None = None,
) -> LayerProblem:  # fmt: skip
    """The search from ``eplb`` int32 [slots], or, for an incremental plan, from ``current``.

    ``earlier`` float [windows, experts]: as of :func:`imbalance`.
    """
    replicas = np.bincount(eplb, minlength=len(counts))
    eplb_load = float((counts / replicas)[eplb].reshape(topology.num_gpus, -1).sum(1).max())
    weights = replace(budget.imbalance, earlier=budget.imbalance.earlier * config.shift_weight)
    balance = imbalance(tokens, counts, eplb_load, topology.num_gpus, COST_UNIT, weights, earlier)
    allowance = config.load_noise_allowance * balance.noise * counts.sum() / topology.num_gpus
    start, move_cost, max_moves = eplb, 0, UNLIMITED
    home = np.ones((len(counts), topology.num_gpus), np.uint8)
    if current is not None and config.keeps_current:
        start, move_cost = current, config.move_cost
        max_moves = UNLIMITED if config.max_moves is None else config.max_moves
        home[:] = 0
        home[current, np.arange(len(current)) // (len(current) // topology.num_gpus)] = 1
    return LayerProblem(
        counts=counts,
        tokens=tokens,
        start=start,
        load_cap=int(eplb_load * (1 + config.max_load_increase) + allowance),
        imbalance=balance,
        home=home,
        move_cost=move_cost,
        max_moves=max_moves,
        seed=(config.seed << 20) + layer + 1,
        adapts_replicas=config.keeps_current,
    )
