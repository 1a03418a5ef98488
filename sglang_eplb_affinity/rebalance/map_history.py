"""What rank 0 remembers of its maps from round to round, and when a layer goes back to the best map that it has had.

Each round judges, on the window that was recorded under the map in force, that map, the map before it, and each layer's
best. A layer goes back if its map is worse than its best one by more than the window's own spread (block_spread.py),
in cost or in load, and no better in the other; by cost alone only if that is so with what the loads of earlier windows
cost as well. Hysteresis, so that chance makes no two maps alternate: the map that a
layer went back from is forgotten and is not put in force again for a number of rounds; each return doubles that number
and the spread that the next return asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sglang_eplb_affinity.dispatch.evaluate import over_layers
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.recorded_map import KEY, MapOrigin
from sglang_eplb_affinity.planner.block_spread import STANDARD_ERRORS, Excess, block_figures, excess
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.earlier_windows import EARLIER_WINDOWS, better_over_windows
from sglang_eplb_affinity.planner.layer_figures import LayerFigures, sampled
from sglang_eplb_affinity.rebalance.delivery import Delivery

HOLD_ROUNDS = 4
MOST_RETURNS = 4


@dataclass(frozen=True)
class Judging:
    """How maps are compared. ``by_cost``: dispatch cost counts beside load; False for EPLB's own algorithms."""

    topology: Topology
    config: PlannerConfig
    by_cost: bool


@dataclass(frozen=True)
class MapHistory:
    """Maps are int32 [layers, slots].

    ``in_force``: after the last round; ``promised``: its figures on that round's window. ``previous``: before the last
    change. ``best``: of each layer; ``best_figures`` on the last window. ``left``: the map that a layer went back from
    and that is not put in force for ``hold`` rounds int64 [layers]; ``returns`` int64 [layers]. ``shares`` float32
    [windows, layers, experts]: RoutingWindow.shares of the last windows, oldest first.
    """

    in_force: np.ndarray
    promised: LayerFigures
    best: np.ndarray
    best_figures: LayerFigures
    left: np.ndarray
    hold: np.ndarray
    returns: np.ndarray
    previous: np.ndarray | None = None
    shares: np.ndarray | None = None

    @staticmethod
    def starting(in_force: ExpertMap, promised: LayerFigures, best: LayerFigures | None = None) -> MapHistory:
        """Of a map that was planned elsewhere, with the figures that came with it."""
        rows, layers = in_force.physical_to_logical, in_force.num_layers
        none = np.zeros(layers, np.int64)
        return MapHistory(rows, promised, rows, best or promised, np.full_like(rows, -1), none, none)

    def to_file(self, in_force: ExpertMap) -> dict[str, Any]:
        """Fields of MapOrigin; ``in_force``: the map that is recorded, of which a failed round may lack layers."""
        rows = in_force.physical_to_logical
        promised = self.promised.only((self.in_force == rows).all(1))
        best = None if np.array_equal(self.best, rows) else self.best.tolist()
        return {"promised": promised.to_json(), "best_map": self.best_figures.to_json(), "best_slots": best}

    @staticmethod
    def of_file(in_force: ExpertMap, origin: MapOrigin, source: str) -> MapHistory | None:
        """What a recorded map's file says; None without. Raises InputError for what does not fit the map."""
        rows = in_force.physical_to_logical
        try:
            promised = LayerFigures.of_json(origin.promised, len(rows))
            best = LayerFigures.of_json(origin.best_map, len(rows))
            slots = rows if origin.best_slots is None else np.array(origin.best_slots, np.int32)
            if promised is None or best is None:
                return None
            if slots.shape != rows.shape:
                raise ValueError(f"best_slots has shape {slots.shape}, but the map has {rows.shape}")
            ExpertMap(slots, in_force.num_experts)
        except (ValueError, TypeError, KeyError, InputError) as error:
            raise InputError(
                f"{source}: its entry {KEY} has figures that do not fit the map ({error}); delete promised, best_map "
                "and best_slots to load the map without them"
            ) from None
        return replace(MapHistory.starting(in_force, promised, best), best=slots)

    def remembering(self, window: RoutingWindow) -> MapHistory:
        """With the shares of ``window`` as well, which planning of the next one sees as an earlier one."""
        latest = window.shares()[None]
        kept = latest if self.shares is None else np.concatenate([self.shares, latest])[-EARLIER_WINDOWS:]
        return replace(self, shares=kept)

    def fits(self, current: ExpertMap) -> bool:
        return self.in_force.shape == current.physical_to_logical.shape


@dataclass(frozen=True)
class Comparison:
    """``best`` int32 [layers, slots]: each layer's best, the map in force included. ``back`` bool [layers]: go back."""

    delivery: Delivery
    best: np.ndarray
    back: np.ndarray
    history: MapHistory | None
    excesses: Mapping[int, Excess] = field(default_factory=dict)

    def held(self, planned: np.ndarray) -> np.ndarray:
        """bool [layers]: where ``planned`` int32 [layers, slots] is what the layer went back from not long ago."""
        if self.history is None:
            return np.zeros(len(planned), bool)
        return np.asarray((self.history.hold > 0) & (self.history.left == planned).all(1))

    def after(self, current: np.ndarray, planned: np.ndarray, promised: LayerFigures) -> MapHistory:
        """The history once ``planned`` int32 [layers, slots] is in force in place of ``current``."""
        layers = len(current)
        known = self.history
        hold = np.zeros(layers, np.int64) if known is None else np.maximum(known.hold - 1, 0)
        returns = np.zeros(layers, np.int64) if known is None else known.returns.copy()
        left = np.full_like(current, -1) if known is None else known.left.copy()
        if known is not None:
            returns -= (known.hold == 1) & (returns > 0)
        for layer in self.delivery.returned:
            returns[layer] = min(returns[layer] + 1, MOST_RETURNS)
            hold[layer], left[layer] = HOLD_ROUNDS << returns[layer], current[layer]
        changed = bool((planned != current).any())
        best_figures = self.delivery.best_map or self.delivery.delivered
        previous = current if changed else None if known is None else known.previous
        shares = None if known is None else known.shares
        return MapHistory(planned, promised, self.best, best_figures, left, hold, returns, previous, shares)


def compare(
    history: MapHistory | None, window: RoutingWindow, current: ExpertMap, judging: Judging
) -> Comparison | None:
    """Judge ``current`` and what ``history`` knows on the ``window`` recorded under it; None without a sample."""
    rows, topology, config = current.physical_to_logical, judging.topology, judging.config
    delivered = LayerFigures.of(window, rows, topology, config)
    if delivered is None:
        return None
    known = history if history is not None and history.fits(current) else None
    traffic = np.isfinite(delivered.load)
    nowhere = np.zeros(len(rows), bool)
    if known is None:
        delivery = Delivery(delivered, np.where(traffic, 0.0, np.nan), best_map=delivered)
        return Comparison(delivery, rows, nowhere, None)
    previous = None if known.previous is None else LayerFigures.of(window, known.previous, topology, config)
    differs = (known.best != rows).any(1) & traffic
    of_best = delivered.with_layers(LayerFigures.of(window, known.best, topology, config, differs), differs)
    found = _excesses(window, rows, known.best, differs, judging)
    margin = config.minimum_gain or 0.0
    back, kept = nowhere.copy(), nowhere.copy()
    for layer, difference in found.items():
        errors = STANDARD_ERRORS * 2.0 ** known.returns[layer]
        back[layer] = difference.worse(judging.by_cost, margin, errors)
        if back[layer] and judging.by_cost and difference.clear("load", margin, errors) <= 0:
            tokens = sampled(window, layer)
            back[layer] = not better_over_windows(
                rows[layer], known.best[layer], window, layer, tokens, topology, config
            )
        kept[layer] = not difference.better(judging.by_cost, margin)
    above = [delivered.load / of_best.load - 1]
    if judging.by_cost:
        with np.errstate(invalid="ignore", divide="ignore"):
            above.append(np.where(of_best.cost > 0, delivered.cost / of_best.cost - 1, 0.0))
    regret = np.where(traffic, np.where(kept, np.maximum(np.max(above, 0), 0.0), 0.0), np.nan)
    best = np.where(kept[:, None], known.best, rows)
    promised = known.promised.only((known.in_force == rows).all(1))
    delivery = Delivery(delivered, regret, promised, previous, of_best)
    return Comparison(delivery, best, back, known, found)


def _excesses(
    window: RoutingWindow, ours: np.ndarray, theirs: np.ndarray, layers: np.ndarray, judging: Judging
) -> dict[int, Excess]:
    """By layer of ``layers`` bool [layers]: how far ``ours`` is above ``theirs``, both int32 [layers, slots]."""
    chosen = np.flatnonzero(layers).tolist()

    def one(number: int) -> Excess:
        layer = chosen[number]
        tokens = sampled(window, layer)
        both = [
            block_figures(rows[layer], window.num_experts, tokens, judging.topology, judging.config)
            for rows in (ours, theirs)
        ]
        return excess(*both)

    return dict(zip(chosen, over_layers(one, len(chosen), judging.config.resolved_threads()), strict=True))


def with_returned(comparison: Comparison, returned: Sequence[int]) -> Comparison:
    """Knowing which layers really go back."""
    return replace(comparison, delivery=replace(comparison.delivery, returned=tuple(returned)))


def reason_of(comparison: Comparison, returned: Sequence[int]) -> str | None:
    """Why the first of the layers go back, for the log."""
    if not returned:
        return None

    def of(layer: int) -> str:
        found = comparison.excesses[layer]
        pairs = (("cost", found.cost, found.cost_error), ("load", found.load, found.load_error))
        return f"layer {layer} " + ", ".join(f"{name} {value:+.1%} (+-{error:.1%})" for name, value, error in pairs)

    rest = f" and {len(returned) - 3} more" if len(returned) > 3 else ""
    named = "; ".join(of(layer) for layer in returned[:3])
    return f"{len(returned)} layers go back to their best map, against which the map in force gave: {named}{rest}"
