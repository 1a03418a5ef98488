"""Two maps on the same tokens: whether one is worse by more than the window's own spread.

A window is one draw of traffic, so a difference between two maps on it is partly chance. Its tokens are cut into blocks
(of time, where the sample is in order of time), both maps are judged on each, and the spread of their difference over
the blocks says how far it can be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.judge import BLOCKS, LEAST_TOKENS, NOT_KEPT, cost_of, dispatch_sample

STANDARD_ERRORS = 4.0


@dataclass(frozen=True)
class Excess:
    """By what fraction one map is above another on a window, and the standard errors of that.

    Positive: worse. Not numbers, with infinite errors, where a window has too few tokens to tell.
    """

    cost: float
    load: float
    cost_error: float
    load_error: float

    def clear(self, name: str, margin: float, errors: float) -> int:
        """1 (worse), -1 (better) or 0 (may be chance) in ``cost`` or ``load``."""
        value, error = getattr(self, name), getattr(self, f"{name}_error")
        return int(np.sign(value)) if abs(value) > max(margin, errors * error) else 0

    def worse(self, by_cost: bool, margin: float, errors: float = STANDARD_ERRORS) -> bool:
        """Whether it is clearly worse in one and not clearly better in the other; by load alone without ``by_cost``."""
        signs = self._signs(by_cost, margin, errors)
        return max(signs) > 0 and min(signs) >= 0

    def better(self, by_cost: bool, margin: float, errors: float = STANDARD_ERRORS) -> bool:
        """The other way round, or above on the mean in neither."""
        signs = self._signs(by_cost, margin, errors)
        means = (self.load, self.cost) if by_cost else (self.load,)
        return (min(signs) < 0 and max(signs) <= 0) or max(means) <= 0

    def _signs(self, by_cost: bool, margin: float, errors: float) -> list[int]:
        return [self.clear(name, margin, errors) for name in (("load", "cost") if by_cost else ("load",))]


@dataclass(frozen=True)
class BlockFigures:
    """Of one map: cost per token float64 [blocks], tokens int64 [blocks], assignments of GPUs int64 [blocks, gpus]."""

    cost: np.ndarray
    tokens: np.ndarray
    load: np.ndarray

    def without_each(self) -> np.ndarray:
        """float64 [blocks + 1, 2]: (cost, load max/mean) of all tokens, then of all but those of each block."""
        tokens, costs = self.tokens.sum(), self.cost * self.tokens
        cost = np.append(costs.sum() / tokens, (costs.sum() - costs) / (tokens - self.tokens))
        load = np.concatenate([self.load.sum(0, keepdims=True), self.load.sum(0) - self.load])
        return np.stack([cost, load.max(1) / load.mean(1)], 1)


def block_figures(
    row: np.ndarray, num_experts: int, tokens: np.ndarray, topology: Topology, config: PlannerConfig
) -> BlockFigures:
    """``row`` int32 [slots] on the blocks of tokens int16 [T, k]."""
    blocks = min(BLOCKS, len(tokens) // LEAST_TOKENS)
    parts = np.array_split(tokens, blocks) if blocks else []
    cost, load = np.empty(blocks), np.empty((blocks, topology.num_gpus), np.int64)
    for number, part in enumerate(parts):
        sums, _, slot_load = dispatch_sample(row, num_experts, part, topology, config.dispatch, NOT_KEPT)
        load[number] = slot_load.reshape(topology.num_gpus, -1).sum(1)
        cost[number] = cost_of(sums, len(part), topology, config)
    return BlockFigures(cost, np.array([len(part) for part in parts], np.int64), load)


def excess(ours: BlockFigures, theirs: BlockFigures) -> Excess:
    """Of one map over another on the same tokens; errors by the jackknife (each block left out in turn, Quenouille)."""
    blocks = len(ours.tokens)
    if blocks < 4:
        return Excess(np.nan, np.nan, np.inf, np.inf)
    mine, other = ours.without_each(), theirs.without_each()
    differences = (mine - other) / np.maximum(other[0], 1e-9)
    spread = ((differences[1:] - differences[1:].mean(0)) ** 2).sum(0)
    error = np.sqrt(spread * (blocks - 1) / blocks)
    return Excess(*map(float, (*differences[0], *error)))
