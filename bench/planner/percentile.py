"""Plans accepted by the mean load alone, and by its 95th percentile over blocks too: what later tokens say of both."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.planner.quality import Case, Split
from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan
from sglang_eplb_affinity.planner.plan_layer import NOT_BETTER

PERCENTILE_CASES = (Case(8, 2), Case(8, 2, 8))
ALLOWANCES = (None, 0.1, 0.05, 0.0)
TEST_BLOCKS = 16


def percentile_rows(split: Split, case: Case) -> list[dict[str, Any]]:
    """One row per arm, all on the test tokens; ``eplb_layers``: left to EPLB's map, no plan was accepted."""
    window = split.window()
    slots = window.num_experts + case.redundant
    eplb = eplb_placement(window.counts, case.topology, slots)
    rows = [{"arm": "deepseek", "p95_allowance": "", "eplb_layers": "", **_on_test(split, eplb, case, "dynamic")}]
    for allowance in ALLOWANCES:
        planned = plan(window, case.topology, slots, PlannerConfig(p95_allowance=allowance))
        arm = "mean" if allowance is None else "mean and 95th percentile"
        left = sum(reason == NOT_BETTER for reason in planned.report.fallback)
        found = _on_test(split, planned.expert_map, case, "cover")
        rows.append({"arm": arm, "p95_allowance": "" if allowance is None else allowance, "eplb_layers": left, **found})
    return [{"trace": split.name, "case": case.label, "layers": window.num_layers, **row} for row in rows]


def _on_test(split: Split, expert_map: ExpertMap, case: Case, rule: DispatchRule) -> dict[str, float]:
    """Means over layers; ``load_p95``: of the loads of ``TEST_BLOCKS`` runs of test tokens."""
    tokens = np.ascontiguousarray(split.test.topk_ids.transpose(1, 0, 2))
    whole = measure(tokens, expert_map, case.topology, rule, None)
    loads = [
        measure(part, expert_map, case.topology, rule, None).load_max_over_mean
        for part in np.array_split(tokens, TEST_BLOCKS, axis=1)
    ]
    return {
        "gpu_fanout": float(whole.gpu_fanout.mean()), "load_max_over_mean": float(whole.load_max_over_mean.mean()),
        "load_p95": float(np.percentile(loads, 95, axis=0).mean()),
    }  # fmt: skip
