"""How well the routing model of :mod:`.routing_model` stands in for a recording: the same figures from both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan
from sglang_eplb_affinity.simulate.routing_model import LayerGroups, draw_like, fit_layer
from sglang_eplb_affinity.simulate.source import split_rows

METRICS = ("gpu_fanout", "node_fanout", "load_max_over_mean")


@dataclass(frozen=True)
class Fidelity:
    """One placement on one topology: means over layers and test tokens, of the recording and of the model's draw."""

    placement: str
    topology: Topology
    recorded: dict[str, float]
    drawn: dict[str, float]

    @property
    def worst_error_pct(self) -> float:
        return max(100 * abs(self.drawn[name] / self.recorded[name] - 1) for name in METRICS)


def fidelity(trace: RoutingTrace, topologies: list[Topology], layers: int = 6, seed: int = 0) -> list[Fidelity]:
    """Plan on one half and judge on the other, once with recorded and once with drawn tokens of the same rows."""
    picked = np.unique(np.linspace(0, trace.num_layers - 1, min(layers, trace.num_layers)).astype(int))
    in_plan = split_rows(trace)
    rows = (np.flatnonzero(in_plan), np.flatnonzero(~in_plan))
    fitted = [fit_layer(trace.topk_ids[:, layer], trace.num_experts, seed=seed) for layer in picked]
    recorded = tuple(_recorded(trace, picked, part) for part in rows)
    drawn = tuple(_drawn(fitted, part, trace.top_k, 11 + i) for i, part in enumerate(rows))
    out = []
    for topology in topologies:
        real = _figures(recorded[0], recorded[1], trace.num_experts, topology)
        made = _figures(drawn[0], drawn[1], trace.num_experts, topology)
        out += [Fidelity(name, topology, real[name], made[name]) for name in real]
    return out


def _recorded(trace: RoutingTrace, layers: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(trace.topk_ids[rows][:, layers].transpose(1, 0, 2), dtype=np.int16)


def _drawn(fitted: list[LayerGroups], rows: np.ndarray, top_k: int, seed: int) -> np.ndarray:
    return np.stack([draw_like(entry, rows, top_k, seed * 64 + number) for number, entry in enumerate(fitted)])


def _figures(
    plan_tokens: np.ndarray, test_tokens: np.ndarray, experts: int, topology: Topology
) -> dict[str, dict[str, float]]:
    counts = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in plan_tokens]).astype(np.int64)
    window = RoutingWindow(counts, None, plan_tokens)
    maps = {
        "contiguous": ExpertMap.contiguous(len(plan_tokens), experts, experts),
        "EPLB": eplb_placement(counts, topology, experts),
        "affinity": plan(window, topology, experts, PlannerConfig()).expert_map,
    }
    out = {}
    for name, expert_map in maps.items():
        traffic = measure(test_tokens, expert_map, topology, "cover", None)
        out[name] = {metric: float(getattr(traffic, metric).mean()) for metric in METRICS}
    return out


def fidelity_table(rows: list[Fidelity]) -> str:
    """Markdown: recorded / drawn."""
    lines = [
        "| GPUs/nodes | placement | GPU fan-out | node fan-out | load max/mean | worst |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row.recorded[name]:.3f} / {row.drawn[name]:.3f}" for name in METRICS]
        where = f"{row.topology.num_gpus}/{row.topology.num_nodes}"
        lines.append(f"| {where} | {row.placement} | {' | '.join(cells)} | {row.worst_error_pct:.1f} % |")
    return "\n".join(lines)
