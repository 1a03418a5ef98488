"""Planning time at DeepSeek-V3 size beside SGLang's EPLB, interleaved in one process; memory and start-up apart."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.planner.synthetic import synthetic_trace
from bench.planner.upstream import upstream_map
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan, warm_up

LAYERS, EXPERTS, SLOTS, TOP_K, TOKENS = 58, 256, 288, 8, 8192
TOPOLOGY = Topology(32, 4)


def dsv3_windows() -> tuple[RoutingWindow, RoutingWindow]:
    """Two following windows of 8192 synthetic tokens a layer, of the same topics."""
    trace = synthetic_trace(2 * TOKENS, LAYERS, EXPERTS, TOP_K)
    halves = [RoutingTrace(trace.topk_ids[part], EXPERTS) for part in (slice(TOKENS), slice(TOKENS, None))]
    return RoutingWindow.from_trace(halves[0]), RoutingWindow.from_trace(halves[1])


def speed_rows(rebalance: Callable[..., Any] | None, repeats: int) -> list[dict[str, Any]]:
    """Median, fastest and slowest of ``repeats`` rounds; ratios are of the same round."""
    first, second = dsv3_windows()
    warm_up()
    current = plan(first, TOPOLOGY, SLOTS).expert_map

    def eplb(hierarchical: bool) -> Callable[[], object]:
        if rebalance is None:
            return lambda: eplb_placement(second.counts, TOPOLOGY, SLOTS, hierarchical=hierarchical)
        return lambda: upstream_map(rebalance, second.counts, TOPOLOGY, SLOTS, hierarchical)

    name = "own EPLB" if rebalance is None else "SGLang"
    arms: dict[str, Callable[[], object]] = {
        f"{name} deepseek": eplb(False),
        f"{name} deepseek_hierarchical": eplb(True),
        "affinity fast, full": lambda: plan(second, TOPOLOGY, SLOTS),
        "affinity fast, incremental (2 moves a rank and layer)": lambda: plan(
            second, TOPOLOGY, SLOTS, PlannerConfig(max_moves=2), current
        ),
        "affinity fast, full, no redundant experts": lambda: plan(second, TOPOLOGY, EXPERTS),
    }
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, run in arms.items():
            began = time.perf_counter()
            run()
            times[arm].append(time.perf_counter() - began)
    names = list(arms)
    reference, full = names[0], names[2]
    rows = []
    for arm, taken in times.items():
        to_eplb = [a / b for a, b in zip(taken, times[reference], strict=True)]
        to_full = [a / b for a, b in zip(taken, times[full], strict=True)]
        row: dict[str, Any] = {"arm": arm, "repeats": repeats, **_spread("seconds", taken)}
        rows.append({**row, **_spread("ratio_to_eplb", to_eplb), **_spread("ratio_to_full", to_full)})
    return rows


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


_CHILD = """
import json, resource, sys, time
import numpy as np
began = time.perf_counter()
from sglang_eplb_affinity.planner import plan, warm_up
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
imported = time.perf_counter() - began
ready = warm_up()
out = {"import_s": imported, "warm_up_s": ready}
if len(sys.argv) > 1:
    data = np.load(sys.argv[1])
    window = RoutingWindow(data["counts"], None, data["tokens"])
    out["before_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    plan(window, Topology(32, 4), int(sys.argv[2]))
    out["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(out))
"""


def start_up_and_memory() -> list[dict[str, Any]]:
    """Start-up with an empty and with a filled kernel cache, and peak memory of a process that plans (fresh ones)."""
    window, _ = dsv3_windows()
    assert window.tokens is not None
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "window.npz")
        np.savez(data, counts=window.counts, tokens=window.tokens)
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(Path(folder, "cache"))}
        runs = [_child(environment, []), _child(environment, []), _child(environment, [str(data), str(SLOTS)])]
    return [
        {"what": "import and compile, empty cache (s)", "value": runs[0]["import_s"] + runs[0]["warm_up_s"]},
        {"what": "import and load, filled cache (s)", "value": runs[1]["import_s"] + runs[1]["warm_up_s"]},
        {"what": "peak memory of the process before planning (MB)", "value": runs[2]["before_mb"]},
        {"what": "peak memory of the process after planning (MB)", "value": runs[2]["peak_mb"]},
    ]


def _child(environment: dict[str, str], args: list[str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *args], env=environment, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))
