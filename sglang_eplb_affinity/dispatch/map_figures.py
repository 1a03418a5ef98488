"""What one expert map makes of a recorded window: the figures of the log line, the metrics and the recorded map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.dispatch.evaluate import dealt_sources, measure
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology


@dataclass(frozen=True)
class MapFigures:
    """One map on the window's sampled tokens under the server's dispatch rule; means over layers with traffic.

    ``balancedness``: mean over most loaded GPU (1 is perfect). ``gpu_fanout``, ``node_fanout``: distinct GPUs (nodes)
    per token. ``remote_gpu_copies``, ``remote_node_copies``: those of them that are not the token's own. The recorder
    does not know where a token came from, so tokens are taken to come from all GPUs evenly. Under ``static`` and
    ``cover``, which prefer replicas near a token, the sampled tokens are dealt out to the GPUs in turn for all figures.
    """

    balancedness: float
    gpu_fanout: float
    node_fanout: float
    remote_gpu_copies: float
    remote_node_copies: float

    @staticmethod
    def of(
        window: RoutingWindow, expert_map: ExpertMap, topology: Topology, rule: DispatchRule, threads: int = 1
    ) -> MapFigures | None:
        """None without a token sample."""
        recorded = np.flatnonzero(window.counts.any(1))
        if window.tokens is None or not len(recorded):
            return None
        sub_map = ExpertMap(expert_map.physical_to_logical[recorded], expert_map.num_experts)
        tokens = window.tokens[recorded]
        anywhere = rule == "dynamic"  # which prefers no replica, so copies are exact without dealing
        traffic = measure(tokens, sub_map, topology, rule, dealt_sources(tokens.shape[1], topology), threads)
        gpu_fanout, node_fanout = float(traffic.gpu_fanout.mean()), float(traffic.node_fanout.mean())
        gpu_copies, node_copies = float(traffic.remote_gpu_copies.mean()), float(traffic.remote_node_copies.mean())
        return MapFigures(
            balancedness=float((1 / np.maximum(traffic.load_max_over_mean, 1e-9)).mean()),
            gpu_fanout=gpu_fanout,
            node_fanout=node_fanout,
            remote_gpu_copies=gpu_fanout * (1 - 1 / topology.num_gpus) if anywhere else gpu_copies,
            remote_node_copies=node_fanout * (1 - 1 / topology.num_nodes) if anywhere else node_copies,
        )
