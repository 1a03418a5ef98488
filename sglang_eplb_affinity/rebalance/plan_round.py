"""What the planner process does for one round: from the recorded window to the layers that are to move."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan
from sglang_eplb_affinity.planner.judge import judge
from sglang_eplb_affinity.planner.layout import align
from sglang_eplb_affinity.rebalance.layer_moves import LayerPlan, layer_plan
from sglang_eplb_affinity.rebalance.round_record import MapFigures, routing_checksum

logger = logging.getLogger(__name__)

Algorithm = Literal["affinity", "deepseek", "deepseek_hierarchical"]
ALGORITHMS: tuple[Algorithm, ...] = ("affinity", "deepseek", "deepseek_hierarchical")


@dataclass(frozen=True)
class PlanSettings:
    """What stays the same from round to round.

    ``staging_rows``: how many slots of a rank can change in a layer at once; a layer that needs more stays as it is.
    ``nodes_of_eplb`` and ``expert_groups`` are for deepseek_hierarchical.
    """

    algorithm: Algorithm
    planner: PlannerConfig
    topology: Topology
    minimum_gain: float
    staging_rows: int
    nodes_of_eplb: int = 1
    expert_groups: int | None = None


@dataclass(frozen=True)
class PlanRequest:
    """``current``: the map in force; ``first``: no planned map is in force yet."""

    window: RoutingWindow
    current: ExpertMap
    settings: PlanSettings
    first: bool = False


@dataclass(frozen=True)
class PlanReply:
    """``layers``: what is to move, largest gain first; empty with ``result`` other than ``planned``.

    The rest is as in RoundRecord.
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


def plan_round(request: PlanRequest) -> PlanReply:
    """Plan, leave out the layers that gain too little, and work out the moves and tables of the others."""
    began = time.perf_counter()
    window, current, settings = request.window, request.current, request.settings
    settings = replace(settings, planner=settings.planner.for_window(window))
    tokens = int(window.counts.sum(1).max(initial=0))
    if not tokens:
        return PlanReply("skipped", "no tokens recorded")
    planned = _place(request)
    gain = layer_gains(window, current, planned, settings)
    differs = planned.physical_to_logical != current.physical_to_logical
    order = [int(layer) for layer in np.argsort(-gain, kind="stable") if differs[layer].any()]
    arrivals = differs.reshape(len(differs), settings.topology.num_gpus, -1).sum(2).max(1)
    chosen = [n for n in order if gain[n] >= settings.minimum_gain and arrivals[n] <= settings.staging_rows]
    home = ExpertMap.contiguous(current.num_layers, current.num_experts, current.num_slots)
    contiguous = MapFigures.of(window, home, settings.topology, settings.planner.dispatch)
    common = {"tokens": tokens, "routing_checksum": routing_checksum(window), "contiguous": contiguous}
    before = MapFigures.of(window, current, settings.topology, settings.planner.dispatch)
    if not chosen:
        reason = f"no layer gains {settings.minimum_gain:.2%} within {settings.staging_rows} moves" if order else None
        seconds = time.perf_counter() - began
        return PlanReply("unchanged", reason, before=before, after=before, seconds=seconds, **common)  # type: ignore[arg-type]
    rows = current.physical_to_logical.copy()
    rows[chosen] = planned.physical_to_logical[chosen]
    after_map = ExpertMap(rows, current.num_experts)
    layers = tuple(
        layer_plan(
            layer, current.physical_to_logical[layer], rows[layer], current.num_experts, settings.topology,
            settings.planner.dispatch,
        )
        for layer in chosen
    )  # fmt: skip
    return PlanReply(
        "planned",
        layers=layers,
        before=before,
        after=MapFigures.of(window, after_map, settings.topology, settings.planner.dispatch),
        seconds=time.perf_counter() - began,
        **common,  # type: ignore[arg-type]
    )


def _place(request: PlanRequest) -> ExpertMap:
    window, current, settings = request.window, request.current, request.settings
    if settings.algorithm == "affinity":
        config = settings.planner
        if request.first and config.max_moves is None:
            config = replace(config, incremental=False, warm_start=False)
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


def layer_gains(window: RoutingWindow, old: ExpertMap, new: ExpertMap, settings: PlanSettings) -> np.ndarray:
    """float64 [layers]: the larger of the relative falls of dispatch cost and of the most loaded GPU's load."""
    gain = np.zeros(window.num_layers)
    for layer in np.flatnonzero((old.physical_to_logical != new.physical_to_logical).any(1)):
        counts = window.counts[layer]
        tokens = np.empty((0, 1), np.int16)
        if window.tokens is not None:
            tokens = np.ascontiguousarray(window.tokens[layer][window.tokens[layer][:, 0] >= 0], dtype=np.int16)
        if not counts.any():
            continue
        before, after = (
            judge(m.physical_to_logical[layer], counts, tokens, settings.topology, settings.planner) for m in (old, new)
        )
        by_load = 1 - after.load / before.load
        by_cost = 1 - after.cost / before.cost if before.cost > 0 and settings.algorithm == "affinity" else by_load
        gain[layer] = max(by_load, by_cost)
    return gain
