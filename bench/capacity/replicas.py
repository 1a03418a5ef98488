"""Simulated gain of many replicas, on held-out tokens, over EPLB at its best number of redundant experts.

Served by ``cover_balanced`` in prefill, by ``static`` in decode (low latency).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.simulate.memory import expert_gb
from sglang_eplb_affinity.simulate.scenario import Interval, Phase, PhaseResult, simulate
from sglang_eplb_affinity.simulate.source import RoutingSource, sampled_layers
from sglang_eplb_affinity.simulate.system import load_system

LAYERS, RESAMPLES = 3, 4
# Name of the entry, preset, GPUs, phase, redundant experts of EPLB to choose from, of affinity.
RUNS: tuple[tuple[str, str, int, Phase, tuple[int, ...], int], ...] = (
    ("deepseek_v3_ep32.prefill", "deepseek-v3-h200", 32, "prefill", (0, 32, 64, 256), 256),
    ("qwen3_235b_ep32.prefill", "qwen3-235b-h200", 32, "prefill", (0, 32, 64, 128), 128),
    ("qwen3_235b_ep16.prefill", "qwen3-235b-h200", 16, "prefill", (0, 16, 32, 128), 128),
    ("deepseek_v3_ep32.decode", "deepseek-v3-h200", 32, "decode", (0, 32, 64, 256), 256),
)


def replica_gains(plan: RoutingTrace, test: RoutingTrace) -> list[dict[str, Any]]:
    """One row per run: gain in % with the range of resampled batches, the redundancies, fan-outs, load and memory."""
    rows = []
    for name, preset, gpus, phase, of_eplb, redundant in RUNS:
        system = load_system(preset)
        layers = sampled_layers(system.model, LAYERS)
        source = RoutingSource(plan, test, system.model, layers)
        source.batch = lru_cache(RESAMPLES)(source.batch)  # type: ignore[assignment, method-assign]
        serving = system.serving
        tokens = serving.prefill_tokens_per_gpu if phase == "prefill" else serving.decode_batch_per_gpu

        def run(number: int, algorithm: Any) -> PhaseResult:
            sized = system.resized(gpus, number)  # noqa: B023 (called at once)
            rules: tuple[DispatchRule, ...] = ("cover_balanced" if phase == "prefill" else "static",)  # noqa: B023
            return simulate(sized, source, [(phase, tokens)], [algorithm], resamples=RESAMPLES, rules=rules)[0]  # noqa: B023

        eplb = min((run(number, "eplb") for number in of_eplb), key=lambda result: result.step_ms.value)
        ours = run(redundant, "affinity")
        gain = Interval.of(100 * (1 - np.array(ours.step_ms_samples) / np.array(eplb.step_ms_samples)))
        sized = system.resized(gpus, redundant)
        gb, of_best = expert_gb(sized, redundant), expert_gb(sized, eplb.redundant)
        rows.append({
            "name": f"simulate.replicas.{name}_gain_pct",
            "hardware": f"simulated {gpus} x {system.gpu.name}, routing fitted to the tiny MoE's recording",
            "redundant": redundant, "rule": ours.dispatch_rule,
            "EPLB's best": eplb.redundant, "gain %": gain.value, "lower": gain.lower, "upper": gain.upper,
            "GPU fan-out": ours.gpu_fanout, "node fan-out": ours.node_fanout, "load": ours.load_max_over_mean,
            "GB of experts a GPU": gb, "more than EPLB's best": gb - of_best,
            "unit": f"% shorter step, {redundant} redundant and `{ours.dispatch_rule}` ({gb:.1f} GB of experts a GPU) "
            f"against EPLB's best, {eplb.redundant} ({of_best:.1f} GB)",
        })  # fmt: skip
    return rows
