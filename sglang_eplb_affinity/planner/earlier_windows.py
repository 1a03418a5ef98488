"""What a layer's loads in earlier windows say of its maps."""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.budget import budget_for
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.judge import Earlier, judge

EARLIER_WINDOWS = 3  # whose loads a server's plan looks at, beside those of its own window


def earlier_of(window: RoutingWindow, layer: int, num_slots: int, config: PlannerConfig) -> Earlier:
    """The earlier windows in which the layer had traffic, and what they weigh."""
    weight = budget_for(window.num_experts, num_slots, config).imbalance.earlier * config.shift_weight
    shares = np.empty((0, window.num_experts)) if window.earlier is None else window.earlier[:, layer]
    return Earlier(shares[shares.any(1)], weight)


def better_over_windows(
    ours: np.ndarray, theirs: np.ndarray, window: RoutingWindow, layer: int, tokens: np.ndarray, topology: Topology,
    config: PlannerConfig,
) -> bool:  # fmt: skip
    """Whether ``ours`` int32 [slots] costs less than ``theirs``, with what earlier windows show of loads."""
    earlier = earlier_of(window, layer, len(ours), config)
    mine, other = (judge(row, window.counts[layer], tokens, topology, config, earlier) for row in (ours, theirs))
    return mine.objective < other.objective
