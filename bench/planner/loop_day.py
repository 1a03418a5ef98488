"""A day whose domains change, served in rounds as a server has them: EPLB, and affinity that heeds earlier windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from bench.planner.quality import Case, Split
from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement
from sglang_eplb_affinity.rebalance.map_history import EARLIER_WINDOWS
from sglang_eplb_affinity.rebalance.plan_round import PlanRequest, PlanSettings, plan_round
from sglang_eplb_affinity.simulate.replay import HOURS, domain_mix

WINDOWS = 24
WINDOW_TOKENS = 4096
RUN_TOKENS = 128  # tokens of a sequence that stay together
POOLS = 4
DAY_CASES = (Case(8, 2), Case(8, 2, 8))
SHIFT_WEIGHTS = (PlannerConfig.shift_weight, 0.0, 0.5, 1.0, 2.0, 4.0)  # the first is what servers do
OTHER_DAYS = (1, 2, 3, 4)  # on which EARLIER_WINDOWS and the default weight were chosen
MORE_WINDOWS = 8


@dataclass(frozen=True)
class Arm:
    """``windows``: so many earlier ones are heeded; 0: with nothing of what a server remembers, of maps either.

    ``foresight``: in their place the plan sees the loads of the window that it will serve, which no server can.
    """

    windows: int = EARLIER_WINDOWS
    shift_weight: float = SHIFT_WEIGHTS[0]
    rule: DispatchRule = "cover"
    name: str = "affinity, with memory"
    foresight: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)  # of PlannerConfig


EPLB, FREE = Arm(0, 0.0, "dynamic", "deepseek"), Arm(0, 0.0, name="affinity")
SERVER, LONGER = Arm(), Arm(MORE_WINDOWS, 1.0)
FORESEEN = Arm(1, name="affinity, next window's loads known", foresight=True)
TRIED = (
    Arm(WINDOWS, name="with memory of the whole day"),
    Arm(name="with memory, 95th percentile", changes={"p95_allowance": 0.1}),
    Arm(name="with memory, strict load cap", changes={"load_noise_allowance": 0.0}),
    Arm(name="with memory, no load above EPLB's", changes={"load_noise_allowance": 0.0, "max_load_increase": 0.0}),
    Arm(name="with memory, longer search", changes={"search_scale": 4}),
)


def day_windows(trace: RoutingTrace, seed: int = 0, changing: bool = True) -> list[RoutingWindow]:
    """The hours of a day, each with its mix of domains, in random order of tokens as a server's sample is.

    Not ``changing``: all hours have all domains alike, so that windows differ by their sequences alone.

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
        mix = (
            domain_mix(HOURS * window / WINDOWS, len(domains)) if changing else np.full(len(domains), 1 / len(domains))
        )
        for domain, share in zip(domains, mix, strict=True):
            rows = np.flatnonzero((trace.domain == domain) & (pool == window % POOLS))
            runs = max(1, round(WINDOW_TOKENS * share / RUN_TOKENS))
            start = random.integers(0, max(1, len(rows) - RUN_TOKENS), runs)
            picked.append(rows[(start[:, None] + np.arange(min(RUN_TOKENS, len(rows)))).ravel() % len(rows)])
        chosen = random.permutation(np.concatenate(picked))
        found.append(RoutingWindow.from_trace(RoutingTrace(trace.topk_ids[chosen], trace.num_experts)))
    return found


def day_rows(split: Split, case: Case) -> list[dict[str, Any]]:
    """One row per day and arm; every window is served by the map that was planned on the windows before it."""
    traces = [split.plan, split.test]
    if any(trace.domain is None or len(np.unique(trace.domain)) < 2 for trace in traces):
        return []
    whole = RoutingTrace(
        np.concatenate([trace.topk_ids for trace in traces]), split.plan.num_experts,
        np.concatenate([_sequences(trace) + number * 1_000_000 for number, trace in enumerate(traces)]),
        np.concatenate([trace.domain for trace in traces if trace.domain is not None]), split.plan.domain_names,
    )  # fmt: skip
    # Replicas let a pass be balanced as it comes; the curve of weights is drawn where only the plan can do anything.
    rule: DispatchRule = "cover_balanced" if case.redundant else "cover"
    curve = () if case.redundant else SHIFT_WEIGHTS[1:]
    rows = _day_rows(whole, case, rule, 0, True, (SERVER, *(Arm(shift_weight=weight) for weight in curve), FORESEEN))
    rows += _day_rows(whole, case, rule, 0, False, (SERVER,))
    for day in OTHER_DAYS[:2] if case.redundant else OTHER_DAYS:
        tried = TRIED if day == OTHER_DAYS[0] and not case.redundant else ()
        rows += _day_rows(whole, case, rule, day, True, (SERVER, LONGER, *tried))
    return [{"trace": split.name, "case": case.label, **row} for row in rows]


def _day_rows(
    trace: RoutingTrace, case: Case, rule: DispatchRule, day: int, changing: bool, arms: Sequence[Arm]
) -> list[dict[str, Any]]:
    """EPLB's row, that of affinity without memory and those of ``arms``, on one day's windows."""
    windows = day_windows(trace, day, changing)
    served = [_served(windows, case, arm) for arm in (EPLB, *(replace(arm, rule=rule) for arm in (FREE, *arms)))]
    common = {"day": day, "domains": "changing" if changing else "steady"}
    return [common | _with_ratios(row, *served[:2]) for row in served]


def _served(windows: list[RoutingWindow], case: Case, arm: Arm) -> dict[str, Any]:
    """Means over the day's windows from the second on, under the maps that ``arm`` planned on those before."""
    layers, experts = windows[0].counts.shape
    planner = PlannerConfig(minimum_gain=0.02, warm_start=True, dispatch=arm.rule, shift_weight=arm.shift_weight)
    planner = replace(planner, **arm.changes)
    settings = PlanSettings("affinity", planner, case.topology)
    current = ExpertMap.contiguous(layers, experts, experts + case.redundant)
    history, figures, returned, moved = None, [], 0, 0
    shares = [window.shares() for window in windows]
    for number, (window, served) in enumerate(pairwise(windows)):
        if arm is EPLB:
            current = eplb_placement(window.counts, case.topology, current.num_slots)
        else:
            if history is not None:
                heeded = [served.shares()] if arm.foresight else shares[max(0, number - arm.windows) : number]
                history = replace(history, shares=np.stack(heeded))
            reply = plan_round(PlanRequest(window, current, settings, number == 0, history))
            ids = current.physical_to_logical.copy()
            for layer in reply.layers:
                ids[layer.layer] = layer.slots
                moved += int((layer.source >= 0).sum())
            current = ExpertMap(ids, current.num_experts)
            if arm.windows:
                history = reply.history
                returned += len(reply.delivery.returned) if reply.delivery is not None else 0
        assert served.tokens is not None and window.tokens is not None
        traffic = measure(served.tokens, current, case.topology, arm.rule, None)
        planned = measure(window.tokens, current, case.topology, arm.rule, None).load_max_over_mean.mean()
        load = traffic.load_max_over_mean.mean()
        figures.append([traffic.gpu_fanout.mean(), traffic.node_fanout.mean(), load, planned])
    gpu, node, load, planned = np.mean(figures, 0)
    return {
        "arm": arm.name, "rule": arm.rule, "windows": "" if arm.foresight else arm.windows,
        "shift_weight": arm.shift_weight if arm.windows else "",
        "gpu_fanout": float(gpu), "node_fanout": float(node), "load_max_over_mean": float(load),
        "load_of_planned_window": float(planned),
        "returned_layers": returned, "moved_slots": "" if arm is EPLB else moved,
    }  # fmt: skip


def _with_ratios(row: dict[str, Any], eplb: dict[str, Any], free: dict[str, Any]) -> dict[str, Any]:
    """Against EPLB, and the share of the fan-out gain of affinity without any memory of earlier windows."""
    gain = eplb["gpu_fanout"] - free["gpu_fanout"]
    kept = 100 * (eplb["gpu_fanout"] - row["gpu_fanout"]) / gain if gain else 0.0
    ratio = row["load_max_over_mean"] / eplb["load_max_over_mean"]
    return {**row, "load_ratio_to_eplb": ratio, "fanout_gain_kept_pct": kept}


def day_entries(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Values of the summary's entries, of what a server does, one for each trace; of ``8x2`` without a prefix."""
    found: dict[str, list[float]] = {}
    for row in rows:
        reported = row["day"] == 0 and row["domains"] == "changing" and row["arm"] == SERVER.name
        if reported and row["shift_weight"] == SHIFT_WEIGHTS[0]:
            prefix = "" if row["case"] == DAY_CASES[0].label else f"{row['case']}."
            for name in ("load_ratio_to_eplb", "fanout_gain_kept_pct"):
                found.setdefault(prefix + name, []).append(row[name])
    return found


def _sequences(trace: RoutingTrace) -> np.ndarray:
    return np.arange(trace.num_tokens) // RUN_TOKENS if trace.sequence is None else trace.sequence
