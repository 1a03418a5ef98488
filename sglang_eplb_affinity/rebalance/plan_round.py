"""What every round plans, synchronous or not: from the recorded window to the layers that are to move."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan
from sglang_eplb_affinity.planner.judge import Judgement, judge, worth_moving
from sglang_eplb_affinity.planner.layer_figures import LayerFigures, sampled
from sglang_eplb_affinity.planner.layout import align
from sglang_eplb_affinity.rebalance.delivery import Delivery
from sglang_eplb_affinity.rebalance.going_back import with_best_maps
from sglang_eplb_affinity.rebalance.layer_moves import LayerPlan, layer_plan
from sglang_eplb_affinity.rebalance.map_history import Comparison, Judging, MapHistory, compare
from sglang_eplb_affinity.rebalance.round_record import routing_checksum

Algorithm = Literal["affinity", "deepseek", "deepseek_hierarchical"]
ALGORITHMS: tuple[Algorithm, ...] = ("affinity", "deepseek", "deepseek_hierarchical")


@dataclass(frozen=True)
class PlanSettings:
    """What stays the same from round to round.

    ``planner.minimum_gain`` holds for every algorithm. ``staging_rows``: how many slots of a rank can change in a layer
    at once; a layer that needs more stays as it is. None: any number. ``nodes_of_eplb`` and ``expert_groups`` are for
    deepseek_hierarchical. ``served``: the server's rule, where it is not the one that is planned for.
    """

    algorithm: Algorithm
    planner: PlannerConfig
    topology: Topology
    staging_rows: int | None = None
    nodes_of_eplb: int = 1
    expert_groups: int | None = None
    served: DispatchRule | None = None


@dataclass(frozen=True)
class PlanRequest:
    """``current``: the map in force; ``first``: no planned map is in force yet; ``history``: of the rounds before."""

    window: RoutingWindow
    current: ExpertMap
    settings: PlanSettings
    first: bool = False
    history: MapHistory | None = None


@dataclass(frozen=True)
class PlanReply:
    """``layers``: what is to move, largest gain first; empty with ``result`` other than ``planned``.

    ``history``: for the next round's request. The rest is as in RoundRecord.
    """

    result: Literal["planned", "unchanged", "skipped", "failed"]
    reason: str | None = None
    layers: tuple[LayerPlan, ...] = ()
    tokens: int = 0
    before: MapFigures | None = None
    after: MapFigures | None = None
    contiguous: MapFigures | None = None
    seconds: float = 0.0
    routing_checksum: str | None = None
    delivery: Delivery | None = None
    history: MapHistory | None = None


@dataclass(frozen=True)
class Choice:
    """``planned``: the map after the round. ``layers``: those that differ from the map in force, largest gain first.

    ``reason``: why there is none, where a plan exists, or why layers go back. ``comparison`` None: no token sample.
    """

    planned: ExpertMap
    layers: tuple[int, ...]
    reason: str | None = None
    comparison: Comparison | None = None


def plan_round(request: PlanRequest) -> PlanReply:
    """Plan, leave out the layers that gain too little, and work out the moves and tables of the others."""
    began = time.perf_counter()
    window, current, settings = request.window, request.current, request.settings
    if not window.counts.any():
        return PlanReply("skipped", "no tokens recorded")
    choice = choose_layers(request)
    figures = figures_of_round(window, current, choice.planned, settings)
    layers = tuple(
        layer_plan(
            layer, current.physical_to_logical[layer], choice.planned.physical_to_logical[layer], current.num_experts,
            settings.topology, settings.served or settings.planner.dispatch, settings.planner.further_slots,
        )
        for layer in choice.layers
    )  # fmt: skip
    if choice.comparison is not None:
        figures["delivery"] = choice.comparison.delivery
        figures["history"] = next_history(choice.comparison, window, current, choice.planned, settings)
    seconds = time.perf_counter() - began
    return PlanReply("planned" if layers else "unchanged", choice.reason, layers, seconds=seconds, **figures)


def judging_of(window: RoutingWindow, settings: PlanSettings) -> Judging:
    return Judging(settings.topology, settings.planner.for_window(window), settings.algorithm == "affinity")


def next_history(
    comparison: Comparison, window: RoutingWindow, before: ExpertMap, after: ExpertMap, settings: PlanSettings
) -> MapHistory:
    """Once ``after`` is in force: what it promises on ``window``, and what is known of the maps before it."""
    old, new = before.physical_to_logical, after.physical_to_logical
    changed = (old != new).any(1)
    judging, delivered = judging_of(window, settings), comparison.delivery.delivered
    promised = LayerFigures.of(window, new, judging.topology, judging.config, changed)
    history = comparison.after(old, new, delivered.with_layers(promised, changed))
    return history.remembering(window)


def choose_layers(request: PlanRequest) -> Choice:
    """Plan on a window with tokens, and keep the layers that are not worth their move or have no room for it."""
    current, settings, history = request.current, request.settings, request.history
    if history is not None and history.fits(current):
        request = replace(request, window=replace(request.window, earlier=history.shares))
    settings = replace(settings, planner=settings.planner.for_window(request.window))
    placed = _place(replace(request, settings=settings))
    comparison = compare(request.history, request.window, current, judging_of(request.window, settings))
    back, why = np.zeros(current.num_layers, bool), None
    if comparison is not None:
        limits = [limit for limit in (settings.staging_rows, settings.planner.max_moves) if limit is not None]
        placed, comparison, why = with_best_maps(
            placed, current, comparison, request.window.counts, settings.topology, settings.planner.survive,
            min(limits, default=None),
        )  # fmt: skip
        back[list(comparison.delivery.returned)] = True
    gain, worth = layer_gains(request.window, current, placed, settings)
    worth |= back
    differs = placed.physical_to_logical != current.physical_to_logical
    arrivals = differs.reshape(len(differs), settings.topology.num_gpus, -1).sum(2).max(1)
    room = np.inf if settings.staging_rows is None else settings.staging_rows
    chosen = [int(layer) for layer in np.argsort(-gain, kind="stable") if worth[layer] and arrivals[layer] <= room]
    rows = current.physical_to_logical.copy()
    rows[chosen] = placed.physical_to_logical[chosen]
    least, reason = settings.planner.minimum_gain, None
    if not chosen and (least or worth.any()):
        reason = f"no layer gains {least or 0:.2%}" + (f" within {settings.staging_rows} moves" if worth.any() else "")
    return Choice(ExpertMap(rows, current.num_experts), tuple(chosen), why or reason, comparison)


def figures_of_round(
    window: RoutingWindow, before: ExpertMap, after: ExpertMap, settings: PlanSettings
) -> dict[str, Any]:
    """Fields of PlanReply and RoundRecord: what was recorded, and the maps measured on it."""
    topology, rule, threads = settings.topology, settings.planner.dispatch, settings.planner.threads or 1
    of_before = MapFigures.of(window, before, topology, rule, threads)
    return {
        "tokens": int(window.counts.sum(1).max(initial=0)),
        "routing_checksum": routing_checksum(window),
        "contiguous": MapFigures.of(window, after.contiguous_like(), topology, rule, threads),
        "before": of_before,
        "after": of_before if after is before else MapFigures.of(window, after, topology, rule, threads),
    }


def _place(request: PlanRequest) -> ExpertMap:
    window, current, settings = request.window, request.current, request.settings
    if settings.algorithm == "affinity":
        config = replace(settings.planner, max_changes=settings.staging_rows)
        if request.first and (config.max_moves is None or settings.staging_rows is None):
            config = replace(config, incremental=False, warm_start=False, max_moves=None)
        return plan(window, settings.topology, current.num_slots, config, current).expert_map
    hierarchical = settings.algorithm == "deepseek_hierarchical"
    nodes = settings.nodes_of_eplb if hierarchical else 1
    topology = Topology(settings.topology.num_gpus, nodes)
    placed = eplb_placement(
        window.counts, topology, current.num_slots, hierarchical=hierarchical, num_groups=settings.expert_groups
    )
    # The same placement with GPUs renumbered so that few experts move: all GPUs carry what they did.
    slots_per_gpu = topology.slots_per_gpu(current.num_slots)
    rows = [
        align(new, old, slots_per_gpu, settings.topology.gpus_per_node) if counts.any() else old
        for new, old, counts in zip(placed.physical_to_logical, current.physical_to_logical, window.counts, strict=True)
    ]
    return ExpertMap(np.stack(rows), current.num_experts)


def layer_gains(
    window: RoutingWindow, old: ExpertMap, new: ExpertMap, settings: PlanSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Of each layer that differs: float64 [layers], the larger of the relative falls of dispatch cost and of the most
    loaded GPU's load, for the order of moves; bool [layers], whether it is worth moving.

    A plan with affinity has left the layers that are not worth it as they were; EPLB's placements are for load alone.
    """
    gain, least = np.zeros(window.num_layers), settings.planner.minimum_gain
    worth = (old.physical_to_logical != new.physical_to_logical).any(1)
    for layer in np.flatnonzero(worth & window.counts.any(1)):
        before, after = (_judged(window, m, int(layer), settings) for m in (old, new))
        by_load = 1 - after.load / before.load
        by_cost = 1 - after.cost / before.cost if before.cost > 0 and settings.algorithm == "affinity" else by_load
        gain[layer] = max(by_load, by_cost)
        if settings.algorithm != "affinity" and least is not None:
            worth[layer] = worth_moving(before, after, load_cap=0, minimum_gain=least)
    return gain, worth


def _judged(window: RoutingWindow, expert_map: ExpertMap, layer: int, settings: PlanSettings) -> Judgement:
    tokens = np.empty((0, 1), np.int16)
    if window.tokens is not None:
        tokens = sampled(window, layer)
    row = expert_map.physical_to_logical[layer]
    return judge(row, window.counts[layer], tokens, settings.topology, settings.planner)
