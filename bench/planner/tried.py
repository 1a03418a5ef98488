"""What other settings of the planner give: one setting changed at a time, averaged over several splits of a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np

from bench.planner.quality import SAMPLE_TOKENS, Case, Rebalance, Split, baselines, measure_test
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.planner import PlannerConfig, core, plan
from sglang_eplb_affinity.planner.budget import SearchBudget, budget_for
from sglang_eplb_affinity.planner.imbalance import ImbalanceWeights

SPLIT_SEEDS = (1, 2)
RATIOS = ("gpu_fanout", "node_fanout")
VARIED = (Case(8, 1), Case(16, 4), Case(8, 2, 8))


def several_splits(trace: RoutingTrace, name: str) -> dict[str, Split]:
    """Six splits into halves: of every two neighbouring sequences one plans and one tests, and the other way round."""
    sequence = np.arange(trace.num_tokens) // 128 if trace.sequence is None else trace.sequence
    pairs = int(sequence.max()) // 2 + 1
    chosen = {"even": np.zeros(pairs, np.int64)}
    chosen |= {f"random {seed}": np.random.default_rng(seed).integers(0, 2, pairs) for seed in SPLIT_SEEDS}
    splits = {}
    for label, which in chosen.items():
        first = sequence % 2 == which[sequence // 2]
        splits[label] = Split(name, trace.select(first), trace.select(~first))
        splits[f"{label}, exchanged"] = Split(name, trace.select(~first), trace.select(first))
    return splits


AS_IT_IS = PlannerConfig()


@dataclass(frozen=True)
class Variant:
    """``tokens``: of the search's sample. ``window``: what the planner is shown, all of it by default."""

    name: str
    config: PlannerConfig = AS_IT_IS
    weight: float = 1.0
    blocks: float = 1.0
    margin: float | None = None
    tokens: int | None = None
    window: str = "all"

    def budget(self, num_experts: int, num_slots: int, config: PlannerConfig) -> SearchBudget:
        found = budget_for(num_experts, num_slots, config)
        old = found.imbalance
        margin = old.margin if self.margin is None else self.margin
        new = ImbalanceWeights(old.window * self.weight, old.blocks * self.weight * self.blocks, margin)
        annealing = replace(found.annealing, tokens=self.tokens or found.annealing.tokens)
        return replace(found, imbalance=new, annealing=annealing)

    def shown(self, window: RoutingWindow) -> RoutingWindow:
        assert window.tokens is not None
        if self.window == "co-activation":
            return RoutingWindow(window.counts, window.coactivation)
        if self.window == "first 2048":
            return RoutingWindow(window.counts, None, window.tokens[:, :2048])
        return window


STRICT = PlannerConfig(load_noise_allowance=0.0)
VARIANTS = (
    Variant("as it is"),
    Variant("strict cap, no cost of imbalance", STRICT, weight=0.0),
    Variant("strict cap with the cost of imbalance", STRICT),
    Variant("no cost of imbalance", weight=0.0),
    Variant("cost of imbalance x 1/4", weight=0.25),
    Variant("cost of imbalance x 1/2", weight=0.5),
    Variant("cost of imbalance x 2", weight=2.0),
    Variant("cost of imbalance x 4", weight=4.0),
    Variant("blocks of time x 5", blocks=5.0),
    Variant("every load costs, not only near EPLB's maximum", margin=2.0),
    Variant("node_weight 1 instead of 2", PlannerConfig(node_weight=1)),
    Variant("co-activation matrix only", window="co-activation"),
    Variant("256 sampled tokens", tokens=256),
    Variant("1024 sampled tokens", tokens=1024),
    Variant("the first 2048 tokens as the sample", window="first 2048"),
)


@contextmanager
def _in_force(variant: Variant) -> Iterator[None]:
    with mock.patch.object(core, "budget_for", variant.budget):
        yield


def tried_rows(split: Split, case: Case, rebalance: Rebalance | None) -> list[dict[str, Any]]:
    """One row per variant: change against ``deepseek`` with even spreading, mean and range over the splits.

    Plan and test tokens of ``split`` are put together and split anew. Cases that are not in VARIED only get the
    planner as it is.
    """
    variants = VARIANTS if case in VARIED else VARIANTS[:1]
    splits = several_splits(_joined(split), split.name)
    windows = {label: RoutingWindow.from_trace(one.plan, SAMPLE_TOKENS) for label, one in splits.items()}
    reference = {
        label: measure_test(one, baselines(windows[label], case, rebalance)["deepseek"], case.topology, "dynamic")
        for label, one in splits.items()
    }
    slots = split.plan.num_experts + case.redundant
    rows = []
    for variant in variants:
        found: dict[str, list[float]] = {"gpu_fanout_ratio": [], "node_fanout_ratio": [], "load_difference": []}
        with _in_force(variant):
            for label, one in splits.items():
                planned = plan(variant.shown(windows[label]), case.topology, slots, variant.config)
                values = measure_test(one, planned.expert_map, case.topology, variant.config.dispatch)
                for name in RATIOS:
                    found[f"{name}_ratio"].append(values[name] / reference[label][name])
                load = values["load_max_over_mean"] - reference[label]["load_max_over_mean"]
                found["load_difference"].append(load)
        row: dict[str, Any] = {"trace": split.name, "case": case.label, "variant": variant.name, "splits": len(splits)}
        for name, values_of in found.items():
            row |= {name: float(np.mean(values_of)), f"{name}_min": min(values_of), f"{name}_max": max(values_of)}
        rows.append(row)
    return rows


def _joined(split: Split) -> RoutingTrace:
    """Both halves as one trace; sequences of the second half follow those of the first, numbered in pairs."""
    plan_sequence, test_sequence = (
        np.arange(part.num_tokens) // 128
        if part.sequence is None
        else np.unique(part.sequence, return_inverse=True)[1].astype(np.int64)
        for part in (split.plan, split.test)
    )
    sequence = np.concatenate([2 * plan_sequence, 2 * test_sequence + 1])
    order = np.argsort(sequence, kind="stable")
    ids = np.concatenate([split.plan.topk_ids, split.test.topk_ids])
    return RoutingTrace(ids[order], split.plan.num_experts, sequence[order].astype(np.int32), source=split.plan.source)
