"""Quality of plans on tokens that were not planned on, beside EPLB's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.planner.upstream import upstream_map
from sglang_eplb_affinity.dispatch.evaluate import measure_trace
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, drifted_layers, eplb_placement, guarded_map, plan

Rebalance = Callable[..., Any]
METRICS = ("gpu_fanout", "node_fanout", "extra_nodes", "remote_node_copies", "load_max_over_mean")
SAMPLE_TOKENS = 16384


@dataclass(frozen=True)
class Split:
    """Plan and test tokens of one trace; no sequence is in both."""

    name: str
    plan: RoutingTrace
    test: RoutingTrace

    @staticmethod
    def load(text: str, block: int | None = None) -> Split:
        """``FILE`` (even sequences plan, odd ones test; with ``block``, blocks of so many tokens) or ``PLAN,TEST``."""
        paths = [Path(part) for part in text.split(",")]
        traces = [RoutingTrace.load(path) for path in paths]
        name = paths[0].stem.removesuffix("_plan").removesuffix("_dev").lower().replace("-", "_")
        if len(traces) == 2:
            return Split(name, *traces)
        if len(traces) > 2:
            raise InputError(f"--trace {text}: give one file, or two joined by a comma (plan, test)")
        trace = traces[0]
        if block is None and trace.sequence is not None:
            sequence = trace.sequence
        else:
            sequence = np.arange(trace.num_tokens) // (block or 128)
        return Split(name, trace.select(sequence % 2 == 0), trace.select(sequence % 2 == 1))

    def window(self) -> RoutingWindow:
        return RoutingWindow.from_trace(self.plan, SAMPLE_TOKENS)


@dataclass(frozen=True)
class Case:
    gpus: int
    nodes: int
    redundant: int = 0

    @property
    def topology(self) -> Topology:
        return Topology(self.gpus, self.nodes)

    @property
    def label(self) -> str:
        return f"{self.gpus}x{self.nodes}" + (f"-cover{self.redundant}" if self.redundant else "")

    def fits(self, num_experts: int) -> bool:
        slots = num_experts + self.redundant
        return slots % self.gpus == 0 and slots // self.gpus <= num_experts and slots >= self.gpus


CASES = (Case(8, 1), Case(8, 2), Case(16, 4), Case(2, 2), Case(8, 2, 8), Case(8, 2, 16))
CURVE_CASES = (
    *(Case(8, 2, redundant) for redundant in (0, 8, 16, 24, 32)),
    Case(4, 1), Case(4, 2), Case(16, 2), Case(16, 2, 16), Case(16, 4, 16), Case(32, 4), Case(32, 4, 32),
)  # fmt: skip


def measure_test(split: Split, expert_map: ExpertMap, topology: Topology, rule: DispatchRule) -> dict[str, float]:
    traffic = measure_trace(split.test, expert_map, topology, rule)
    return {name: float(getattr(traffic, name).mean()) for name in METRICS}


def baselines(window: RoutingWindow, case: Case, rebalance: Rebalance | None) -> dict[str, ExpertMap]:
    """EPLB's maps, by SGLang's own code if it is installed. Hierarchical has one group of experts per node."""
    slots = window.num_experts + case.redundant
    names = {"deepseek": False}
    if case.nodes > 1 and window.num_experts % case.nodes == 0 and slots % case.nodes == 0:
        names["deepseek_hierarchical"] = True
    return {
        name: eplb_placement(window.counts, case.topology, slots, hierarchical=hierarchical)
        if rebalance is None
        else upstream_map(rebalance, window.counts, case.topology, slots, hierarchical)
        for name, hierarchical in names.items()
    }


def quality_rows(
    split: Split, case: Case, rebalance: Rebalance | None, seeds: int, efforts: tuple[str, ...]
) -> list[dict[str, Any]]:
    """One row per arm (and planner seed), all measured on the same test tokens.

    EPLB is dispatched with even spreading (dynamic), as it assumes; ours with cover. Without redundant experts the
    rules are the same. Ratios are to ``deepseek``; ``load_difference`` is a difference of max/mean.
    """
    window = split.window()
    rows: list[dict[str, Any]] = []
    for name, expert_map in baselines(window, case, rebalance).items():
        rows.append(
            {"arm": name, "seed": "", "seconds": "", **measure_test(split, expert_map, case.topology, "dynamic")}
        )
    if case.redundant:
        eplb = baselines(window, case, rebalance)["deepseek"]
        rows.append(
            {"arm": "deepseek, cover", "seed": "", "seconds": "", **measure_test(split, eplb, case.topology, "cover")}
        )
    for effort in efforts:
        for seed in range(seeds):
            began = time.perf_counter()
            config = PlannerConfig(effort=effort, seed=seed)  # type: ignore[arg-type]
            planned = plan(window, case.topology, window.num_experts + case.redundant, config)
            seconds = round(time.perf_counter() - began, 3)
            values = measure_test(split, planned.expert_map, case.topology, "cover")
            rows.append({"arm": f"affinity {effort}", "seed": seed, "seconds": seconds, **values})
    reference = rows[0]
    for row in rows:
        for name in METRICS[:4]:
            row[f"{name}_ratio"] = row[name] / reference[name] if reference[name] else 1.0
        row["load_difference"] = row["load_max_over_mean"] - reference["load_max_over_mean"]
    head = {
        "trace": split.name,
        "case": case.label,
        "gpus": case.gpus,
        "nodes": case.nodes,
        "redundant": case.redundant,
    }
    return [{**head, **row} for row in rows]


def floor_rows(split: Split, case: Case, layers: int, scale: int) -> list[dict[str, Any]]:
    """The objective on the PLAN sample for the first layers: both efforts and a search ``scale`` times as long."""
    window = RoutingWindow.from_trace(
        RoutingTrace(split.plan.topk_ids[:, :layers], split.plan.num_experts, source=split.plan.source), SAMPLE_TOKENS
    )
    arms = {
        "affinity fast": PlannerConfig(effort="fast"),
        "affinity thorough": PlannerConfig(effort="thorough"),
        f"long search ({scale} x thorough)": PlannerConfig(effort="thorough", search_scale=scale),
    }
    rows = []
    for arm, config in arms.items():
        report = plan(window, case.topology, window.num_experts + case.redundant, config).report
        rows.append({
            "trace": split.name, "case": case.label, "layers": layers, "arm": arm, "seconds": round(report.seconds, 2),
            "gpu_fanout": float(report.planned.gpu_fanout.mean()),
            "node_fanout": float(report.planned.node_fanout.mean()),
            "load_max_over_mean": float(report.planned.load_max_over_mean.mean()),
        })  # fmt: skip
    return rows


def drift_rows(split: Split, case: Case, guard_tokens: int = 1024) -> list[dict[str, Any]]:
    """Planned on one domain, tested on each: EPLB, affinity, affinity with the load guard, affinity replanned.

    The guard and the replan see the first ``guard_tokens`` test tokens only; all arms are measured on the rest.
    """
    if split.plan.domain is None or split.test.domain is None:
        return []
    domains = [
        d
        for d in range(len(split.plan.domain_names))
        if (split.plan.domain == d).any() and (split.test.domain == d).any()
    ]
    slots = split.plan.num_experts + case.redundant
    config = PlannerConfig()
    rows = []
    for source in domains:
        window = RoutingWindow.from_trace(split.plan.select(split.plan.domain == source), SAMPLE_TOKENS)
        eplb = eplb_placement(window.counts, case.topology, slots)
        affinity = plan(window, case.topology, slots, config).expert_map
        for target in domains:
            test = split.test.select(split.test.domain == target)
            order = np.random.default_rng(0).permutation(test.num_tokens)
            seen = RoutingWindow.from_trace(test.select(np.sort(order[:guard_tokens])))
            rest = Split(split.name, split.plan, test.select(np.sort(order[guard_tokens:])))
            drifted = drifted_layers(seen, case.topology, affinity, eplb, config)
            arms: dict[str, tuple[ExpertMap, DispatchRule]] = {
                "deepseek": (eplb, "dynamic"),
                "affinity": (affinity, "cover"),
                "affinity, load guard": (guarded_map(affinity, eplb, drifted), "cover"),
                "affinity, replanned": (plan(seen, case.topology, slots, config).expert_map, "cover"),
            }
            for arm, (expert_map, rule) in arms.items():
                rows.append({
                    "trace": split.name, "case": case.label, "planned_on": split.plan.domain_names[source],
                    "tested_on": split.plan.domain_names[target], "arm": arm,
                    "layers_given_back": int(drifted.sum()) if "guard" in arm else "",
                    **measure_test(rest, expert_map, case.topology, rule),
                })  # fmt: skip
    return rows
