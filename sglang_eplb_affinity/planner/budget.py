"""How long a layer is searched, and what imbalance costs it. The values are measured: docs/planner.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.dispatch.rules import COVER_RULES
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.imbalance import ImbalanceWeights
from sglang_eplb_affinity.planner.random_steps import schedule

COST_UNIT = 8  # one copy of one token to another GPU, in integer cost units
REDEAL_SHARE = 3 / 8


@dataclass(frozen=True)
class Annealing:
    """One search.

    ``tokens``: how many sampled tokens it looks at. ``hot`` and ``cold``: first and last temperature, i.e. what an
    accepted proposal may typically cost, as a fraction of the tokens of an average expert.
    """

    tokens: int
    stages: int
    steps_per_stage: int
    hot: float
    cold: float

    def temperatures(self, tokens_per_expert: float) -> np.ndarray:
        scale = COST_UNIT * tokens_per_expert * 1024
        return schedule(self.stages, int(self.hot * scale), int(self.cold * scale))


@dataclass(frozen=True)
class SearchBudget:
    """``replicas``: whether the search also chooses which experts are replicated; else it only moves what exists.

    ``redeals``: so often the tokens are dealt to the replicas anew, by the rule and the places found, and the last
    ``REDEAL_SHARE`` of the stages follow: while replicas move, each keeps the tokens that it had before.
    """

    annealing: Annealing
    replicas: bool
    imbalance: ImbalanceWeights
    redeals: int = 0


# Where replicas can be chosen, traffic falls far enough to buy a better balance with some of it; less has to be bought
# where the rule evens out each pass by itself.
_SWAPS = ImbalanceWeights(window=300.0, blocks=10.0, earlier=120.0)
_REPLICAS = ImbalanceWeights(window=360.0, blocks=18.0, earlier=180.0)
_BALANCED_REPLICAS = ImbalanceWeights(window=240.0, blocks=12.0, earlier=180.0)


def _replica_steps(num_experts: int, num_slots: int) -> int:
    """Proposals in a stage: fewer for large models, which have more layers; more where there are many replicas."""
    size = min(64 / num_experts, 1.0)
    many = min(2 * (num_slots / num_experts - 1), 1.0)
    return min(round(1000 * size**0.7 * (1 + 3 * many * size**1.5)), num_experts * num_slots)


def budget_for(num_experts: int, num_slots: int, config: PlannerConfig) -> SearchBudget:
    """The budget for one layer: the same for all layers and ranks."""
    fast = config.effort == "fast"
    scale = config.search_scale
    if config.keeps_current:
        annealing = (
            Annealing(2048, 2, 8000 * scale, 0.0, 0.0) if fast else Annealing(16384, 2, 100000 * scale, 0.0, 0.0)
        )
        return SearchBudget(annealing, False, _SWAPS)
    if num_slots > num_experts and (config.dispatch in COVER_RULES or config.objective not in ("normal", "v2")):
        steps = _replica_steps(num_experts, num_slots) * scale
        tokens = 2048 if fast or num_experts <= 64 else 4096
        annealing = Annealing(tokens, 20 if fast else 40, steps if fast else 4 * steps, 0.1, 0.006)
        return SearchBudget(annealing, True, _BALANCED_REPLICAS if config.dispatch == "cover_balanced" else _REPLICAS)
    annealing = (
        Annealing(4096, 40, 2200 * scale, 0.08, 0.004) if fast else Annealing(16384, 100, 20000 * scale, 0.08, 0.0024)
    )
    return SearchBudget(annealing, False, _SWAPS, redeals=3 if num_slots > num_experts else 0)
