"""Several rebalances in a row: what they gain, and how many experts they move, on steady and on changing traffic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from bench.planner.quality import SAMPLE_TOKENS, Case, Split, measure_test
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan

ROUNDS = 8
ROUND_CASES = (Case(4, 1, 16), Case(4, 2, 16), Case(8, 1, 32), Case(8, 2, 32))
RULES: tuple[DispatchRule, ...] = ("static", "cover")
GAINS = (None, 0.02)
TRAFFIC = ("steady", "changing")


def window_of_round(trace: RoutingTrace, number: int, traffic: str) -> RoutingWindow:
    """A third of the tokens (steady) or of the sequences (changing), drawn anew for every round."""
    if traffic == "steady":
        chosen = np.random.default_rng(number).choice(trace.num_tokens, trace.num_tokens // 3, replace=False)
        return RoutingWindow.from_trace(trace.select(np.isin(np.arange(trace.num_tokens), chosen)), SAMPLE_TOKENS)
    sequence = np.arange(trace.num_tokens) // 128 if trace.sequence is None else trace.sequence
    names = np.unique(sequence)
    drawn = np.random.default_rng(number).choice(names, max(1, len(names) // 3), replace=False)
    return RoutingWindow.from_trace(trace.select(np.isin(sequence, drawn)), SAMPLE_TOKENS)


def round_rows(split: Split, case: Case) -> list[dict[str, Any]]:
    """One row per arm: figures on the test tokens, of the first round's map and over the later rounds.

    ``eplb_layers``: layers that a round left to EPLB's map because its search failed, of all layers and rounds.
    """
    slots = split.plan.num_experts + case.redundant
    home = ExpertMap.contiguous(split.plan.num_layers, split.plan.num_experts, slots)
    head = {"trace": split.name, "case": case.label}
    rows: list[dict[str, Any]] = []
    for traffic in TRAFFIC:
        windows = [window_of_round(split.plan, number, traffic) for number in range(ROUNDS)]
        rows += [{**head, "traffic": traffic, **row} for row in _rows(split, case, slots, home, windows)]
    return rows


def _rows(split: Split, case: Case, slots: int, home: ExpertMap, windows: list[RoutingWindow]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for rule in RULES:
        eplb = [
            measure_test(split, eplb_placement(w.counts, case.topology, slots), case.topology, rule) for w in windows
        ]
        rows.append({"arm": f"EPLB, {rule}", **_figures(eplb), "moved": "", "eplb_layers": ""})
        for gain in GAINS:
            # As a server does: with a minimum gain, rounds after the first refine the map in force.
            config = PlannerConfig(dispatch=rule, minimum_gain=gain)
            current, found, moved, failed = home, [], [], 0
            for number, window in enumerate(windows):
                config = replace(config, warm_start=gain is not None and number > 0)
                planned = plan(window, case.topology, slots, config, current)
                current = planned.expert_map
                found.append(measure_test(split, current, case.topology, rule))
                assert planned.report.moved_experts is not None
                moved.append(int(planned.report.moved_experts.sum()))
                failed += sum("search" in reason for reason in planned.report.fallback)
            arm = f"affinity, {rule}, " + ("every plan taken" if gain is None else f"minimum gain {gain:g}")
            of_layers = f"{failed} of {len(windows) * home.num_layers}"
            rows.append({"arm": arm, **_figures(found), "moved": float(np.mean(moved[1:])), "eplb_layers": of_layers})
    return rows


def _figures(rounds: list[dict[str, float]]) -> dict[str, float]:
    later = rounds[1:]
    return {
        "gpu_fanout_first": rounds[0]["gpu_fanout"],
        "gpu_fanout_last": rounds[-1]["gpu_fanout"],
        "gpu_fanout_worst": max(row["gpu_fanout"] for row in later),
        "node_fanout_last": rounds[-1]["node_fanout"],
        "load_mean": float(np.mean([row["load_max_over_mean"] for row in later])),
    }
