"""Simulated server in DeepEP's auto mode over several nodes, one map for both phases: ``static`` in both, and
affinity's default, ``static`` in decode and ``cover_balanced`` in prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sglang_eplb_affinity.dispatch.rules import LARGE_PASS_RULE, DispatchRule
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.planner import PlannerConfig, plan
from sglang_eplb_affinity.simulate.scenario import Algorithm, Arm, Phase, make_map, one_batch
from sglang_eplb_affinity.simulate.source import RoutingSource, sampled_layers
from sglang_eplb_affinity.simulate.system import DeepEPMode, load_system
from sglang_eplb_affinity.simulate.timing import TimeModel

LAYERS, BATCHES = 2, 4
RUNS: tuple[tuple[str, int, tuple[int, ...]], ...] = (
    ("deepseek-v3-h200", 16, (32, 128)),
    ("deepseek-v3-h200", 32, (32, 256)),
    ("qwen3-235b-h200", 16, (16, 128)),
)
PASSES: tuple[tuple[Phase, DeepEPMode, int], ...] = (
    ("prefill", "normal", 4096),
    ("decode", "low_latency", 32),
    ("decode", "low_latency", 128),
)
# Name, algorithm, the rule that a map is planned for, of prefill.
ARMS: tuple[tuple[str, Algorithm, DispatchRule, DispatchRule], ...] = (
    ("EPLB", "eplb", "static", "static"),
    ("`static` in both", "affinity", "static", "static"),
    ("by phase", "affinity", "static", LARGE_PASS_RULE),
    ("by phase, planned for prefill's rule", "affinity", LARGE_PASS_RULE, LARGE_PASS_RULE),
)


def phase_rows(
    plan_trace: RoutingTrace, test: RoutingTrace, done: Callable[[dict[str, Any]], object] = lambda _: None
) -> list[dict[str, Any]]:
    """One row per cluster, redundancy and arm: steps in ms of a prefill pass and of two decode passes."""
    found = []
    for preset, gpus, redundancies in RUNS:
        for redundant in redundancies:
            system = load_system(preset).resized(gpus, redundant)
            layers = sampled_layers(system.model, LAYERS)
            source = RoutingSource(plan_trace, test, system.model, layers)
            window, model = source.plan_window(), TimeModel(system)
            for name, algorithm, planned, prefill_rule in ARMS:
                if algorithm == "eplb":
                    placed = make_map(Arm("eplb", "static"), window, system, "normal")
                else:
                    config = PlannerConfig(objective="mixed", dispatch=planned, num_groups=system.model.num_groups)
                    placed = plan(window, system.topology, system.num_slots, config).expert_map
                row: dict[str, Any] = {"preset": preset, "GPUs": gpus, "redundant": redundant, "arm": name}
                for phase, mode, tokens in PASSES:
                    prefill = phase == "prefill"
                    arm = Arm(algorithm, prefill_rule if prefill else "static")
                    steps = [
                        one_batch(source.batch(tokens, gpus, prefill, n), placed, arm, model, mode, prefill, tokens)[2]
                        for n in range(BATCHES)
                    ]
                    row[f"{phase} {tokens}"] = float(np.mean(steps))
                found.append(row)
                done(row)
    return found


def phase_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown for docs/capacity_results.md."""
    columns = [f"{phase} {tokens}" for phase, _, tokens in PASSES]
    head = ("cluster", "redundant", "served", *(f"{column} tokens/GPU, ms" for column in columns))
    lines = ["| " + " | ".join(head) + " |", "|---|---:|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [f"{row['preset']}, {row['GPUs']} GPUs", str(row["redundant"]), row["arm"]]
        lines.append("| " + " | ".join([*cells, *(f"{row[column]:.1f}" for column in columns)]) + " |")
    return "\n".join(lines)
