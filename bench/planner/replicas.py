"""Many replicas: quality over redundancy on tokens that were not planned on, and planning time with 512 slots."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.planner.quality import Case
from bench.planner.speed import EXPERTS, SLOTS, TOPOLOGY, dsv3_windows
from sglang_eplb_affinity.planner import PlannerConfig, plan

Row = dict[str, Any]
REPLICA_CASES = (
    *(Case(2, 2, redundant) for redundant in (8, 16, 32, 48, 64)),
    *(Case(8, 2, redundant) for redundant in (32, 64, 128, 192, 256, 448)),
    Case(2, 1, 16), Case(4, 1, 32),
)  # fmt: skip
MANY_SLOTS = 512


def replica_speed_rows(repeats: int) -> list[Row]:
    """DeepSeek-V3's size on 32 GPUs: 512 slots beside 288, full and incremental, interleaved in one process."""
    first, second = dsv3_windows()
    maps = {slots: plan(first, TOPOLOGY, slots).expert_map for slots in (SLOTS, MANY_SLOTS)}
    arms = {
        f"{EXPERTS} experts in {SLOTS} slots": lambda: plan(second, TOPOLOGY, SLOTS),
        f"{EXPERTS} experts in {MANY_SLOTS} slots": lambda: plan(second, TOPOLOGY, MANY_SLOTS),
        f"{MANY_SLOTS} slots, incremental (2 moves a rank and layer)": lambda: plan(
            second, TOPOLOGY, MANY_SLOTS, PlannerConfig(max_moves=2), maps[MANY_SLOTS]
        ),
    }
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, run in arms.items():
            began = time.perf_counter()
            run()
            times[arm].append(time.perf_counter() - began)
    few, many, _ = arms
    rows = []
    for arm, taken in times.items():
        to_few = [a / b for a, b in zip(taken, times[few], strict=True)]
        to_many = [a / b for a, b in zip(taken, times[many], strict=True)]
        rows.append({
            "arm": arm, "repeats": repeats, "seconds": statistics.median(taken),
            f"ratio_to_{SLOTS}": statistics.median(to_few), f"ratio_to_{SLOTS}_min": min(to_few),
            f"ratio_to_{SLOTS}_max": max(to_few), f"ratio_to_{MANY_SLOTS}": statistics.median(to_many),
        })  # fmt: skip
    return rows


def plot_replicas(rows: list[Row], path: Path) -> None:
    """GPU fan-out and load over redundancy, EPLB's and ours, one column for each trace and cluster of several sizes."""
    from matplotlib.figure import Figure

    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['trace']}, {row['gpus']} GPUs on {row['nodes']} nodes", []).append(row)
    groups = {name: group for name, group in groups.items() if len({row["redundant"] for row in group}) > 2}
    if not groups:
        return
    figure = Figure(figsize=(5.5 * len(groups), 7.5), layout="constrained")
    axes = figure.subplots(2, len(groups), squeeze=False, sharex="col")
    for column, (name, group) in enumerate(groups.items()):
        for arm in ("deepseek", "affinity fast", "affinity thorough"):
            numbers = sorted({row["redundant"] for row in group if row["arm"] == arm})
            for axis, metric in zip(axes[:, column], ("gpu_fanout", "load_max_over_mean"), strict=True):
                values = [
                    np.mean([r[metric] for r in group if r["arm"] == arm and r["redundant"] == n]) for n in numbers
                ]
                axis.plot(numbers, values, marker="o", label=arm)
                axis.set(ylabel=metric.replace("_", " "))
        axes[0, column].set(title=name)
        axes[0, column].legend()
        axes[1, column].set(xlabel="redundant experts")
    figure.savefig(path, format="png", dpi=90)
