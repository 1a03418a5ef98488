"""plan(): EPLB's placements, then every layer (plan_layer.py), and the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sglang_eplb_affinity.dispatch.evaluate import moved_experts, over_layers
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.budget import budget_for
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.eplb import eplb_placement
from sglang_eplb_affinity.planner.judge import Judgement
from sglang_eplb_affinity.planner.plan_layer import LayerPlan, plan_layer, unless_little_gain
from sglang_eplb_affinity.planner.report import MapQuality, Plan, PlanReport
from sglang_eplb_affinity.planner.slot_order import in_order
from sglang_eplb_affinity.planner.survival import Survive, uncovered


def plan(
    window: RoutingWindow,
    topology: Topology,
    num_slots: int,
    config: PlannerConfig = PlannerConfig(),  # noqa: B008 (frozen)
    current: ExpertMap | None = None,
    progress: Callable[[int], object] | None = None,
) -> Plan:
    """Place the experts of every layer so that dispatch costs least and no GPU is loaded more than EPLB would load it.

    ``num_slots``: physical experts (logical + redundant). ``current``: the map in use; GPUs and nodes that are
    interchangeable are then numbered so that few experts move, and an incremental plan (``config.incremental``,
    ``config.max_moves``) starts from it. ``progress`` is called with 1 after each layer. Equal input gives equal output
    on every rank. Layers without traffic keep the current map (SGLang's trivial one without). Raises InputError for
    sizes that do not fit and for a window without tokens.
    """
    began = time.perf_counter()
    _check(window, topology, num_slots, config, current)
    config = config.for_window(window)
    eplb = eplb_placement(window.counts, topology, num_slots)
    budget = budget_for(window.num_experts, num_slots, config)
    grouped = _grouped_placement(window.counts, topology, num_slots, config)

    def one(layer: int) -> LayerPlan:
        in_use = None if current is None else current.physical_to_logical[layer]
        other = None if grouped is None else grouped.physical_to_logical[layer]
        result = plan_layer(window, layer, topology, config, budget, eplb.physical_to_logical[layer], in_use, other)
        result = unless_little_gain(result, in_use, window.counts[layer], topology, config)
        if result.slots is not in_use:
            result = replace(result, slots=in_order(result.slots, window.counts[layer], topology, config, in_use))
        if progress is not None:
            progress(1)
        return result

    results = over_layers(one, window.num_layers, config.resolved_threads())
    expert_map = ExpertMap(np.stack([result.slots for result in results]), window.num_experts)
    report = PlanReport(
        eplb=_quality([result.eplb for result in results]),
        planned=_quality([result.planned for result in results]),
        current=None if current is None else _quality([result.current for result in results]),
        fallback=tuple(result.fallback for result in results),
        moved_experts=None if current is None else moved_experts(current, expert_map, topology),
        seconds=time.perf_counter() - began,
        uncovered=None if config.survive == "none" else _uncovered(window.counts, expert_map, topology, config.survive),
    )
    return Plan(expert_map, report)


def _grouped_placement(
    counts: np.ndarray, topology: Topology, num_slots: int, config: PlannerConfig
) -> ExpertMap | None:
    """EPLB's hierarchical placement by expert groups, which SGLang's `auto` takes; None where it does not apply.

    As SGLang does, groups that do not divide over the nodes are not used.
    """
    groups, nodes, experts = config.num_groups, topology.num_nodes, counts.shape[1]
    if groups is None or nodes < 2 or groups % nodes or num_slots % nodes:
        return None
    if experts % groups:
        raise InputError(f"planner: num_groups={groups} does not divide the {experts} experts evenly")
    return eplb_placement(counts, topology, num_slots, hierarchical=True, num_groups=groups)


def _check(
    window: RoutingWindow, topology: Topology, num_slots: int, config: PlannerConfig, current: ExpertMap | None
) -> None:
    topology.slots_per_gpu(num_slots)
    if num_slots < window.num_experts:
        raise InputError(
            f"{num_slots} physical experts cannot hold {window.num_experts} logical experts; each needs a slot"
        )
    if num_slots > window.num_experts * topology.num_gpus:
        raise InputError(
            f"{num_slots} physical experts: more than each of {window.num_experts} logical experts on each of "
            f"{topology.num_gpus} GPUs; use at most {window.num_experts * topology.num_gpus}"
        )
    if window.counts.min(initial=0) < 0:
        raise InputError("routing window: counts are negative; expected tokens per expert")
    if not window.counts.any():
        raise InputError("routing window: empty, no tokens were recorded; record some traffic before planning")
    if current is None:
        if config.keeps_current:
            raise InputError(
                f"planner: incremental={config.incremental}, max_moves={config.max_moves} need the current map"
            )
        return
    shape = (window.num_layers, num_slots)
    if current.physical_to_logical.shape != shape:
        raise InputError(f"current map: has [layers, slots] {current.physical_to_logical.shape}, but must have {shape}")
    if current.num_experts != window.num_experts:
        raise InputError(
            f"current map: holds {current.num_experts} experts, but the routing window has {window.num_experts}"
        )


def _uncovered(counts: np.ndarray, expert_map: ExpertMap, topology: Topology, survive: Survive) -> np.ndarray:
    """float64 [layers, 2]: experts that are lost with one rank (node), and their share of the traffic."""
    out = np.zeros((len(counts), 2))
    for layer in np.flatnonzero(counts.any(1)):
        lost = uncovered(expert_map.physical_to_logical[layer], counts[layer], topology, survive)
        out[layer] = lost.sum(), counts[layer, lost].sum() / counts[layer].sum()
    return out


def _quality(judgements: list[Judgement | None]) -> MapQuality:
    def column(name: str) -> np.ndarray:
        return np.array([np.nan if j is None else getattr(j, name) for j in judgements])

    return MapQuality(column("gpu_fanout"), column("node_fanout"), column("load"), column("cost"))
