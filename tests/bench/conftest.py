"""Records, plans and run folders as the benchmark makes them, without a server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.figures.rebalance_log import parse_log
from bench.harness.profile import Profile
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.schedule import CellKey
from bench.harness.store import CellRecord

# Lines as a patched SGLang 0.5.17 writes them (timestamp and rank from SGLang's own log format).
AFFINITY_LOG = """\
[2026-11-21 20:05:09 TP0 EP0] Prefill batch, #new-seq: 1, #new-token: 24, #cached-token: 0, token usage: 0.00
[2026-11-21 20:05:59 TP0 EP0] [EPLBManager] rebalance start
[2026-11-21 20:05:59 TP1 EP1] [EPLBManager] rebalance start
[2026-11-21 20:05:59 TP0 EP0] [eplb-affinity] rebalance {"algorithm": "affinity", "pass": 80, "moved_experts": 21, \
"moved_layers": 4, "balancedness_before": 0.701, "balancedness_after": 0.962, "gpu_fanout_before": 1.88, \
"gpu_fanout_after": 1.61, "node_fanout_before": null, "node_fanout_after": null, "plan_seconds": 0.004, \
"seconds": 0.021, "result": "applied"}
[2026-11-21 20:05:59 TP0 EP0] [EPLBManager] rebalance end time=0.021s
[2026-11-21 20:05:59 TP1 EP1] [EPLBManager] rebalance end time=0.022s
[2026-11-21 20:06:04 TP0 EP0] [eplb-affinity] rebalance {"algorithm": "affinity", "pass": 160, "moved_experts": 0, \
"moved_layers": 0, "balancedness_before": 0.941, "balancedness_after": 0.941, "gpu_fanout_before": 1.64, \
"gpu_fanout_after": 1.64, "node_fanout_before": null, "node_fanout_after": null, "plan_seconds": 0.003, \
"seconds": 0.004, "result": "unchanged"}
[2026-11-21 20:06:04 TP0 EP0] [EPLBManager] rebalance end time=0.004s
[2026-11-21 20:06:04 TP1 EP1] [EPLBManager] rebalance end time=0.005s
"""
UNPATCHED_LOG = """\
[2026-11-21 20:06:24 TP1 EP1] [EPLBManager] rebalance start
[2026-11-21 20:06:24 TP0 EP0] [EPLBManager] rebalance start
[2026-11-21 20:06:24 TP1 EP1] [EPLBManager] rebalance end time=0.014s
[2026-11-21 20:06:24 TP0 EP0] [EPLBManager] rebalance end time=0.015s
"""


@pytest.fixture
def affinity_log() -> str:
    return AFFINITY_LOG


@pytest.fixture
def unpatched_log() -> str:
    return UNPATCHED_LOG


@pytest.fixture
def plan() -> RunPlan:
    one_at_a_time = replace(Profile.named("cpu"), arms_side_by_side=False)
    return RunPlan(one_at_a_time, ("none", "vanilla", "affinity"), (1, 4), 1, "ShareGPT (test)", "0" * 64)


def make_record(
    key: CellKey, *, void: tuple[str, ...] = (), scale: float = 1.0, served: float | None = None
) -> CellRecord:
    """A record with invented figures, for tests of what is done with records."""
    metrics = {
        "completed": 8.0,
        "p50_ttft_ms": 100.0 * scale,
        "p90_tpot_ms": 20.0 * scale,
        "p95_itl_ms": 30.0 * scale,
        "qps": 2.0 / scale,
        "other_cores": 0.05,
    }
    moved = served is not None
    placement: dict[str, float | int | None] = {"rebalances": 2 * moved, "rebalances_moved": 1 * moved}
    for name, value in (("balancedness", 0.7), ("gpu_fanout", 1.9)):
        placement |= {f"{name}_initial": value if moved else None, f"{name}_served": served}
    placement |= {"node_fanout_initial": None, "node_fanout_served": None}
    rebalances = parse_log(AFFINITY_LOG).rebalances if moved else ()
    return CellRecord(
        key=key,
        finished="2026-11-21T20:06:24Z",
        requests=8,
        seed=1000,
        workload_sha256="1" * 64,
        metrics={} if void else metrics,
        placement=placement,
        rebalances=rebalances,
        void=void,
        provenance={"hardware": "test machine", "commit": "abcdef1", "versions": {"sglang": "0.5.17"}},
    )


@pytest.fixture
def run_folder(tmp_path: Path, plan: RunPlan) -> RunFolder:
    """A run whose affinity row at concurrency 4 is void and whose vanilla row at concurrency 4 is missing."""
    folder = RunFolder(tmp_path / "results" / "run-test")
    folder.path.mkdir(parents=True)
    folder.write_json("run.json", plan.to_json())
    folder.write_json(
        "environment.json",
        {"hardware": "test machine", "versions": {"sglang": "0.5.17"}, "date": "2026-11-21T20:00:00Z", "command": "c"},
    )
    for concurrency in plan.concurrency:
        folder.store.append(make_record(CellKey(0, "none", concurrency)))
    folder.store.append(make_record(CellKey(0, "vanilla", 1), scale=1.1, served=0.95))
    folder.store.append(make_record(CellKey(0, "affinity", 1), scale=0.9, served=0.94))
    folder.store.append(make_record(CellKey(0, "affinity", 4), void=("7 of 8 requests completed",)))
    return folder
