"""What the placements of a comparison make of the routing that a run recorded; computed, not measured.

A server does not hand out its maps, so they are planned anew from the recorded tokens: from one half of them, and shown
on the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.harness.profile import ServerConfig
from sglang_eplb_affinity.dispatch.evaluate import NO_PASS_LOAD, ONE_PASS, dealt_sources, measure_layer
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, DispatchRule, RuleNumber, planned_rule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow, coactivation_of
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan


@dataclass(frozen=True)
class PlacementView:
    """One arm's placement on the tokens it was not planned on.

    ``coactivation`` float64 [layers, slots, slots]: share of tokens that chose both slots' experts, spread evenly over
    replicas, slots in the order of GPUs. ``gpu_load`` float64 [layers, gpus]: over the mean GPU. ``fanout`` int64
    [gpus + 1]: tokens (of all layers) by how many GPUs they visit.
    """

    arm: str
    topology: Topology
    coactivation: np.ndarray
    gpu_load: np.ndarray
    fanout: np.ndarray

    @property
    def mean_fanout(self) -> float:
        return float((self.fanout * np.arange(len(self.fanout))).sum() / max(self.fanout.sum(), 1))


def placement_views(window: RoutingWindow, config: ServerConfig, arms: Sequence[str] = ()) -> list[PlacementView]:
    """Of no EPLB, vanilla EPLB and affinity EPLB, with the profile's redundant experts and dispatch rule; and of
    ``cover`` with its own rule, if the run has it among its ``arms``."""
    assert window.tokens is not None
    topology = Topology(config.ranks, config.nodes)
    rule = dispatch_rule(config)
    slots = window.num_experts + int(config.value("--ep-num-redundant-experts") or 0)
    planned_on, shown_on = window.tokens[:, 0::2], window.tokens[:, 1::2]
    counts = np.stack([np.bincount(layer.ravel(), minlength=window.num_experts) for layer in planned_on])
    half = RoutingWindow(counts.astype(np.int64), coactivation_of(planned_on, window.num_experts), planned_on)
    maps = {
        "none": ExpertMap.contiguous(window.num_layers, window.num_experts, window.num_experts),
        "vanilla": eplb_placement(half.counts, topology, slots),
        "affinity": plan(half, topology, slots, PlannerConfig(dispatch=rule)).expert_map,
    }
    rules = dict.fromkeys(maps, rule)
    if "cover" in arms:
        rules["cover"] = "cover"
        maps["cover"] = plan(half, topology, slots, PlannerConfig(dispatch="cover")).expert_map
    return [view(arm, expert_map, shown_on, topology, rules[arm]) for arm, expert_map in maps.items()]


def view(arm: str, expert_map: ExpertMap, tokens: np.ndarray, topology: Topology, rule: DispatchRule) -> PlacementView:
    """``tokens`` int16 [layers, T, k] without unused rows. They are dealt out to the GPUs in turn, as for the server's
    figures, since where they came from was not recorded."""
    layers, count, k = tokens.shape
    slots_per_gpu = topology.slots_per_gpu(expert_map.num_slots)
    table, replicas = expert_map.logical_to_all_physical(), expert_map.replica_counts()
    together = coactivation_of(tokens, expert_map.num_experts) / max(count, 1)
    load = np.zeros((layers, expert_map.num_slots), np.int64)
    fanout = np.zeros(topology.num_gpus + 1, np.int64)
    sources = dealt_sources(count, topology)
    shares = []
    for layer in range(layers):
        chosen = np.empty((count, k), np.int16)
        measure_layer(
            np.ascontiguousarray(tokens[layer], np.int16), sources, table[layer], replicas[layer],
            slots_per_gpu, topology.gpus_per_node, topology.num_nodes, int(RuleNumber.of(rule)),
            np.zeros(5, np.int64), load[layer], chosen, ONE_PASS, NO_PASS_LOAD,
        )  # fmt: skip
        visited = np.zeros((count, topology.num_gpus), bool)
        np.put_along_axis(visited, chosen.astype(np.int64) // slots_per_gpu, True, axis=1)
        fanout += np.bincount(visited.sum(1), minlength=topology.num_gpus + 1)
        experts = expert_map.physical_to_logical[layer].astype(np.int64)
        part = 1 / replicas[layer][experts]
        shares.append(together[layer][np.ix_(experts, experts)] * np.outer(part, part))
    of_gpu = load.reshape(layers, topology.num_gpus, -1).sum(2)
    return PlacementView(arm, topology, np.stack(shares), of_gpu / of_gpu.mean(1, keepdims=True), fanout)


def dispatch_rule(config: ServerConfig) -> DispatchRule:
    """The profile's; without one the server picks replicas as `dynamic` does."""
    value = config.value("--ep-dispatch-algorithm")
    return planned_rule(value) if value in DISPATCH_RULES else "dynamic"
