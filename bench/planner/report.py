"""The tables as Markdown."""

from __future__ import annotations

import statistics
from typing import Any

Row = dict[str, Any]


def report_text(tables: dict[str, list[Row]], environment: dict[str, Any]) -> str:
    """One document; every table says what it was measured on."""
    parts = [
        "# Planner: quality and speed",
        f"Measured {environment['date']} on {environment['hardware']}; baseline {environment['baseline']}; "
        f"commit {environment['commit'][:12]}. Command: `{environment['command']}`.",
    ]
    if tables.get("quality"):
        parts += [
            "## Quality on tokens that were not planned on",
            "Change against `deepseek` on the same test tokens; plan and test share no sequence (with "
            "`--split-tokens` no token). EPLB spreads evenly "
            "over replicas, affinity uses `cover`. `remote nodes` is the change of node fan-out - 1. Range over "
            "planner seeds in brackets.",
            _quality(tables["quality"]),
        ]
    if tables.get("replicas"):
        parts += [
            "## Many replicas",
            "As above, on tokens that were not planned on; `replicas.png` shows the curves.",
            _quality(tables["replicas"]),
        ]
    if tables.get("replicas_speed"):
        parts += [
            "Planning time, 58 layers on 32 GPUs of 4 nodes, synthetic routing, interleaved:",
            _plain(tables["replicas_speed"]),
        ]
    if tables.get("curves"):
        parts += ["## Other sizes and redundancy (fast effort, one seed)", _quality(tables["curves"])]
    if tables.get("floor"):
        parts += [
            "## Distance to a long search",
            "Fan-outs on the PLAN sample of the first layers, where the search optimises.",
            _plain(tables["floor"]),
        ]
    if tables.get("drift"):
        parts += [
            "## Drift: planned on one domain, tested on another",
            "The guard and the replan have seen 1024 tokens of the test domain; all arms are measured on the others.",
            "Means over pairs of domains; `drift.csv` has every pair.",
            _drift(tables["drift"]),
        ]
    if tables.get("loop"):
        parts += [
            "## A day whose domains change (simulated from recorded tokens)",
            "24 windows of 4096 tokens, each served by the map that was planned on the windows before it, as rounds "
            "of a server do. `with memory`: plans heed the loads of so many earlier windows, by the weight named, and "
            "layers return to their best map where they delivered less; the first such row of a day is what servers "
            "do. `fan-out gain kept`: of affinity with the same rule and no memory. Days 1 to 4 have other sequences "
            "in their windows; on a steady day all windows have all domains alike.",
            _plain([_day(row) for row in tables["loop"]]),
        ]
    if tables.get("percentile"):
        parts += [
            "## Accepted by mean, or by mean and 95th percentile (fast effort, one seed)",
            "Figures on the test tokens; `load_p95` over 16 runs of them. `p95_allowance`: of the plan's 95th "
            "percentile over EPLB's on the plan sample. `eplb_layers`: no plan was accepted.",
            _plain(tables["percentile"]),
        ]
    if tables.get("rounds"):
        parts += [
            "## Rebalances in a row (fast effort, one seed)",
            "Each round plans on another third of the plan tokens (steady) or sequences (changing), starting from the "
            "map before, and is measured on the test tokens under the rule named. `worst` and `load` are of the rounds "
            "after the first, `moved` is experts a round of those, over all layers.",
            _plain(tables["rounds"]),
        ]
    if tables.get("tried"):
        parts += [
            "## One setting changed at a time, six splits by sequence (fast effort, one seed)",
            "Change against `deepseek` on the same test tokens, mean over the splits and their range. Of every two "
            "neighbouring sequences one plans and one tests.",
            _plain([_tried(row) for row in tables["tried"]]),
        ]
    if tables.get("torch"):
        parts += [
            "## The swap search in numba and as batched torch",
            "Same cost, same start, same tokens, no redundant experts, one node; figures on the plan sample. `cost` is "
            "GPU fan-out and the cost of imbalance. The planner's threads for numba, all cores for torch.",
            _plain(tables["torch"]),
        ]
    if tables.get("speed"):
        parts += [
            "## Speed at DeepSeek-V3 size",
            "58 layers, 256 experts to 288 slots, 32 GPUs on 4 nodes, top-8, 8192 sampled tokens a layer, synthetic "
            "routing. Arms interleaved in one process; ratios within a round.",
            _plain(tables["speed"]),
            "Fresh processes:",
            _plain(tables["start"]),
        ]
    return "\n\n".join(parts) + "\n"


def _quality(rows: list[Row]) -> str:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["trace"], row["case"], row["arm"]), []).append(row)
    out = []
    for (trace, case, arm), group in groups.items():
        out.append({
            "trace": trace, "GPUs x nodes": case, "arm": arm, "GPU fan-out": _mean(group, "gpu_fanout"),
            "change": _percent(group, "gpu_fanout_ratio"), "node fan-out": _mean(group, "node_fanout"),
            "change ": _percent(group, "node_fanout_ratio"), "remote nodes": _percent(group, "extra_nodes_ratio"),
            "load max/mean": _mean(group, "load_max_over_mean"), "difference": _mean(group, "load_difference", "+.3f"),
            "seconds": "" if group[0]["seconds"] == "" else _mean(group, "seconds", ".2f"),
        })  # fmt: skip
    return _plain(out)


def _day(row: Row) -> Row:
    return {
        "trace": row["trace"], "GPUs x nodes": row["case"], "day": row["day"], "domains": row["domains"],
        "arm": row["arm"], "rule": row["rule"], "windows": row["windows"], "weight": row["shift_weight"],
        "GPU fan-out": f"{row['gpu_fanout']:.3f}", "node fan-out": f"{row['node_fanout']:.3f}",
        "load max/mean": f"{row['load_max_over_mean']:.3f}", "ratio to EPLB": f"{row['load_ratio_to_eplb']:.3f}",
        "on the planned window": f"{row['load_of_planned_window']:.3f}",
        "fan-out gain kept": f"{row['fanout_gain_kept_pct']:.0f} %", "layers gone back": row["returned_layers"],
    }  # fmt: skip


def _tried(row: Row) -> Row:
    def percent(name: str) -> str:
        mean, low, high = (100 * (row[f"{name}_ratio{end}"] - 1) for end in ("", "_min", "_max"))
        return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"

    load = f"{row['load_difference']:+.3f} [{row['load_difference_min']:+.3f}, {row['load_difference_max']:+.3f}]"
    return {
        "trace": row["trace"], "GPUs x nodes": row["case"], "variant": row["variant"],
        "GPU fan-out": percent("gpu_fanout"), "node fan-out": percent("node_fanout"), "load difference": load,
    }  # fmt: skip


def _drift(rows: list[Row]) -> str:
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        where = "its own domain" if row["planned_on"] == row["tested_on"] else "another domain"
        groups.setdefault((row["trace"], row["case"], where, row["arm"]), []).append(row)
    return _plain([
        {
            "trace": trace, "GPUs x nodes": case, "tested on": where, "arm": arm, "pairs": len(group),
            "GPU fan-out": _mean(group, "gpu_fanout"), "node fan-out": _mean(group, "node_fanout"),
            "load max/mean": _mean(group, "load_max_over_mean"),
        }
        for (trace, case, where, arm), group in groups.items()
    ])  # fmt: skip


def _mean(rows: list[Row], name: str, style: str = ".3f") -> str:
    return format(statistics.mean(row[name] for row in rows), style)


def _percent(rows: list[Row], name: str) -> str:
    values = [100 * (row[name] - 1) for row in rows]
    text = f"{statistics.mean(values):+.1f} %"
    return text if len(values) == 1 else f"{text} [{min(values):+.1f}, {max(values):+.1f}]"


def _plain(rows: list[Row]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)
