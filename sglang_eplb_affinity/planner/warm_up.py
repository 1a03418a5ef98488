"""Compile or load every kernel before the first rebalance needs it."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from sglang_eplb_affinity.dispatch.numba_rules import static_slots
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.core import plan
from sglang_eplb_affinity.planner.even_primaries import primaries_first
from sglang_eplb_affinity.planner.further_slots import with_further_first


def warm_up(config: PlannerConfig = PlannerConfig()) -> float:  # noqa: B008 (frozen)
    """Run tiny plans that touch every kernel of a round; returns the seconds it took.

    Kernels are specialised by type, never by shape, so one call serves every model. With a warm disk cache it takes
    about a second, else the compilation (some tens of seconds, once per machine).
    """
    began = time.perf_counter()
    tokens = np.array([[[0, 1], [2, 3], [0, 2], [1, 3]]], np.int16)
    counts = np.array([[2, 2, 2, 2]], np.int64)
    pairs = np.ones((1, 4, 4), np.int64)
    topology = Topology(2, 2)
    rules_of_servers: tuple[DispatchRule, ...] = ("cover", "dynamic", *(("primary",) if config.even_primaries else ()))
    for window in (RoutingWindow(counts, None, tokens), RoutingWindow(counts, pairs, None)):
        for slots in (4, 6):
            for rule in rules_of_servers:
                even = rule == "primary"
                rules = dataclasses.replace(
                    config, dispatch=rule, even_primaries=even, further_slots=0, max_moves=None, threads=1
                )
                first = plan(window, topology, slots, rules).expert_map
                plan(
                    window,
                    topology,
                    slots,
                    dataclasses.replace(rules, max_moves=1),
                    ExpertMap(first.physical_to_logical, 4),
                )
    if config.even_primaries:  # the order of slots, from a map in force
        row = np.array([0, 1, 2, 3, 2, 3, 0, 1], np.int32)
        primaries_first(row, counts[0], topology, row)
        with_further_first(row, counts[0], topology, 1, config.node_weight)
    # What a round calls beside plans: the tables of `static`.
    static_slots(np.zeros((1, 1), np.int32), np.ones(1, np.int32), 1, 1, 1)
    return time.perf_counter() - began
