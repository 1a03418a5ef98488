"""What judging a round's maps costs where rounds are planned, beside planning: CPU time; no pass waits for it.

    python -m bench.micro.round_costs --out FILE.json

Rank 0 (with --eplb-async its planner process) judges the map in force, the one before it and each layer's best on the
window just recorded, and works out what the plan promises. Also counts the operations of torch in planning and judging,
on any device.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness.environment import now, provenance
from bench.harness.output_paths import write_result
from bench.micro.options import out_and_repeats
from bench.planner.quality import SAMPLE_TOKENS
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig
from sglang_eplb_affinity.rebalance.map_history import MapHistory, compare
from sglang_eplb_affinity.rebalance.plan_round import (
    PlanRequest,
    PlanSettings,
    choose_layers,
    judging_of,
    next_history,
    plan_round,
)

TRACE = "bench/data/tiny_moe_plan.npz"
TOPOLOGY, REDUNDANT = Topology(8, 2), 8


class Launches(TorchDispatchMode):
    """Counts operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return function(*args, **(kwargs or {}))


def windows_of(trace: RoutingTrace, count: int) -> list[RoutingWindow]:
    """So many windows of interleaved tokens."""
    number = np.arange(trace.num_tokens) % count
    return [RoutingWindow.from_trace(trace.select(number == n), SAMPLE_TOKENS) for n in range(count)]


def after_two_rounds(windows: list[RoutingWindow], settings: PlanSettings) -> tuple[ExpertMap, MapHistory]:
    """A map in force that has a map before it and, in every layer, another that counts as its best."""
    experts = windows[0].num_experts
    current, history = ExpertMap.contiguous(windows[0].num_layers, experts, experts + REDUNDANT), None
    for number, window in enumerate(windows[:2]):
        reply = plan_round(PlanRequest(window, current, settings, number == 0, history))
        rows = current.physical_to_logical.copy()
        for layer in reply.layers:
            rows[layer.layer] = layer.slots
        current, history = ExpertMap(rows, experts), reply.history
    assert history is not None and history.previous is not None
    other = np.where((history.best == history.in_force).all(1)[:, None], history.previous, history.best)
    return current, MapHistory(**{**vars(history), "best": other})


def main(arguments: Sequence[str] | None = None) -> int:
    options = out_and_repeats("bench.micro.round_costs", __doc__, 5, arguments)
    windows = windows_of(RoutingTrace.load(TRACE), 3)
    settings = PlanSettings("affinity", PlannerConfig(minimum_gain=0.02, warm_start=True, threads=1), TOPOLOGY)
    current, history = after_two_rounds(windows, settings)
    window = windows[2]
    request = PlanRequest(window, current, settings, history=history)
    rows = []
    for _ in range(options.repeats):
        with Launches() as launches:
            began = time.process_time()
            choice = choose_layers(request)
            chosen = time.process_time()
            comparison = compare(history, window, current, judging_of(window, settings))
            judged = time.process_time()
            assert comparison is not None
            next_history(comparison, window, current, choice.planned, settings)
            done = time.process_time()
        planning = chosen - began - (judged - chosen)  # which compares as well
        rows.append({"planning": planning, "judging": done - chosen, "launches": launches.count})
    shares = [row["judging"] / row["planning"] for row in rows]
    figures: dict[str, Any] = {
        "judging_to_planning": {f"p{q}": round(float(np.percentile(shares, q)), 4) for q in (0, 50, 100)},
        "torch_operations": max(row["launches"] for row in rows),
    }
    sizes = {"layers": window.num_layers, "experts": window.num_experts, "sampled_tokens": window.tokens.shape[1]}  # type: ignore[union-attr]
    print(
        f"judging takes {figures['judging_to_planning']['p50']:.1%} of the CPU time of planning a round; "
        f"torch operations: {figures['torch_operations']}"
    )
    result = {"date": now(), "provenance": provenance(), "trace": TRACE, **sizes, "rounds": rows, **figures}
    write_result(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
