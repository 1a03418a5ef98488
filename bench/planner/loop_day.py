"""A day whose domains change, served in rounds as a server has them: EPLB, affinity, and affinity that goes back."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from bench.planner.quality import Case, Split
from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement
from sglang_eplb_affinity.rebalance.plan_round import PlanRequest, PlanSettings, plan_round
from sglang_eplb_affinity.simulate.replay import HOURS, domain_mix

WINDOWS = 24
WINDOW_TOKENS = 4096
RUN_TOKENS = 128  # tokens of a sequence that stay together
POOLS = 4
DAY_CASES = (Case(8, 2), Case(8, 2, 8))
ARMS = ("deepseek", "affinity", "affinity, going back")


def day_windows(trace: RoutingTrace, seed: int = 0) -> list[RoutingWindow]:
    """The hours of a day, each with its mix of domains, in random order of tokens as a server's sample is.

    Sequences are dealt out to ``POOLS`` pools and hour h draws from pool h modulo ``POOLS``, so that no token of a
    window was in the three windows before it.
    """
    assert trace.domain is not None
    sequence = np.arange(trace.num_tokens) // RUN_TOKENS if trace.sequence is None else trace.sequence
    names = np.unique(sequence)
    pool = np.random.default_rng(seed).permutation(len(names))[np.searchsorted(names, sequence)] % POOLS
    domains = np.unique(trace.domain)
    found = []
    for window in range(WINDOWS):
        random = np.random.default_rng([seed, window])
        picked = []
        for domain, share in zip(domains, domain_mix(HOURS * window / WINDOWS, len(domains)), strict=True):
            rows = np.flatnonzero((trace.domain == domain) & (pool == window % POOLS))
            runs = max(1, round(WINDOW_TOKENS * share / RUN_TOKENS))
            start = random.integers(0, max(1, len(rows) - RUN_TOKENS), runs)
            picked.append(rows[(start[:, None] + np.arange(min(RUN_TOKENS, len(rows)))).ravel() % len(rows)])
        chosen = random.permutation(np.concatenate(picked))
        found.append(RoutingWindow.from_trace(RoutingTrace(trace.topk_ids[chosen], trace.num_experts)))
    return found


def day_rows(split: Split, case: Case) -> list[dict[str, Any]]:
    """One row per arm; every window is served by the map that was planned on the windows before it."""
    traces = [split.plan, split.test]
    if any(trace.domain is None or len(np.unique(trace.domain)) < 2 for trace in traces):
        return []
    whole = RoutingTrace(
        np.concatenate([trace.topk_ids for trace in traces]), split.plan.num_experts,
        np.concatenate([_sequences(trace) + number * 1_000_000 for number, trace in enumerate(traces)]),
        np.concatenate([trace.domain for trace in traces if trace.domain is not None]), split.plan.domain_names,
    )  # fmt: skip
    windows = day_windows(whole)
    slots = whole.num_experts + case.redundant
    rows = []
    for arm in ARMS:
        settings = PlanSettings("affinity", PlannerConfig(minimum_gain=0.02, warm_start=True), case.topology)
        rule: DispatchRule = "dynamic" if arm == "deepseek" else "cover"
        current = ExpertMap.contiguous(whole.num_layers, whole.num_experts, slots)
        history, figures, returned, moved = None, [], 0, 0
        for number, (window, served) in enumerate(pairwise(windows)):
            if arm == "deepseek":
                current = eplb_placement(window.counts, case.topology, slots)
            else:
                reply = plan_round(PlanRequest(window, current, settings, number == 0, history))
                ids = current.physical_to_logical.copy()
                for layer in reply.layers:
                    ids[layer.layer] = layer.slots
                    moved += int((layer.source >= 0).sum())
                current = ExpertMap(ids, current.num_experts)
                if arm == ARMS[2]:
                    history = reply.history
                    returned += len(reply.delivery.returned) if reply.delivery is not None else 0
            assert served.tokens is not None
            traffic = measure(served.tokens, current, case.topology, rule, None)
            figures.append([traffic.gpu_fanout.mean(), traffic.node_fanout.mean(), traffic.load_max_over_mean.mean()])
        gpu, node, load = np.mean(figures, 0)
        rows.append({
            "trace": split.name, "case": case.label, "arm": arm, "gpu_fanout": float(gpu), "node_fanout": float(node),
            "load_max_over_mean": float(load), "returned_layers": returned,
            "moved_slots": moved if arm != "deepseek" else "",
        })  # fmt: skip
    return [{**row, **_ratios(row, rows)} for row in rows]


def _ratios(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Against EPLB, and the share of the fan-out gain of affinity that does not go back."""
    eplb, free = rows[0], rows[1]
    gain = eplb["gpu_fanout"] - free["gpu_fanout"]
    kept = 100 * (eplb["gpu_fanout"] - row["gpu_fanout"]) / gain if gain else 0.0
    return {"load_ratio_to_eplb": row["load_max_over_mean"] / eplb["load_max_over_mean"], "fanout_gain_kept_pct": kept}


def day_entries(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Values of the summary's entries, one for each trace and case."""
    going_back = [row for row in rows if row["arm"] == ARMS[2]]
    if not going_back:
        return {}
    return {name: [row[name] for row in going_back] for name in ("load_ratio_to_eplb", "fanout_gain_kept_pct")}


def _sequences(trace: RoutingTrace) -> np.ndarray:
    return np.arange(trace.num_tokens) // RUN_TOKENS if trace.sequence is None else trace.sequence
