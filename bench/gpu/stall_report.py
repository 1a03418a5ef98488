"""What the stall comparison's cells and server logs say (see rebalance_stall.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.figures.stats import ratio_by_block
from bench.gpu.flags import ranks_of
from bench.publish.summary import of_ranks

_ROUND = re.compile(r"\[eplb-affinity\] rebalance (\{.*\})")
_UPSTREAM = re.compile(r"TP0.*\[EPLBManager\] rebalance end time=([\d.]+)s")


# While the streams are admitted, passes that prefill the later ones hold up the first.
ADMISSION_MS = 500.0


def settled(itl_ms: np.ndarray) -> np.ndarray:
    """One stream's inter-token latencies without its first half second, or first quarter if it is short."""
    return itl_ms[np.cumsum(itl_ms) > min(ADMISSION_MS, itl_ms.sum() / 4)]


def spread(values: np.ndarray) -> dict[str, float]:
    return {"p50": np.percentile(values, 50), "p99": np.percentile(values, 99), "max": values.max()}


METRICS = {
    "p99_itl": lambda cell: cell["itl_ms"]["p99"],
    "max_itl": lambda cell: cell["itl_ms"]["max"],
    "throughput": lambda cell: cell["decode_throughput"],
}


def ratios(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``MODE-ARM LOAD``: each metric over that of no rebalancing, paired by block."""
    found: dict[str, dict[str, Any]] = {}
    for arm, load in sorted({(cell["arm"], cell["load"]) for cell in cells}):
        base = arm.rsplit("-", 1)[0] + "-none"
        for metric, of in METRICS.items():
            values, reference = (
                {c["block"]: of(c) for c in cells if (c["arm"], c["load"]) == (name, load) and c["block"] >= 0}
                for name in (arm, base)
            )
            if arm != base and set(values) & set(reference):
                found.setdefault(f"{arm} {load}", {})[metric] = ratio_by_block(values, reference).as_dict()
    return found


def rounds(log: str) -> dict[str, Any]:
    """What the server's log says of its rebalances; times of both kinds of them."""
    ours = [json.loads(match) for match in _ROUND.findall(log)]
    upstream = [float(match) for match in _UPSTREAM.findall(log)]
    applied = [record for record in ours if record["result"] == "applied"]
    commits = [value for record in applied for value in record.get("commit_ms", [])]
    found: dict[str, Any] = {"results": {r: sum(x["result"] == r for x in ours) for r in {x["result"] for x in ours}}}
    if applied and commits:
        found |= {
            "seconds_to_last_commit": spread(np.asarray([record["seconds"] for record in applied])),
            "passes": spread(np.asarray([record["passes"] for record in applied])),
            "moved_mb_per_round": spread(np.asarray([record["moved_bytes"] for record in applied]) / 1e6),
            "commit_ms_per_layer": spread(np.asarray(commits)),
            "layers_committed": len(commits),
        }
    if upstream:
        found["upstream_seconds_per_rebalance"] = spread(np.asarray(upstream))
        found["upstream_rebalances"] = len(upstream)
    return found


def entries(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Summary entries: the worst of all modes and loads, named; arms with fewer than two blocks make none."""
    source = result["provenance"]
    common = {
        "kind": "measured", "hardware": source["hardware"], "versions": source["versions"],
        "commit": source["commit"], "date": result["date"], "command": result["command"],
    }  # fmt: skip
    found = []

    def add(name: str, value: dict[str, float], unit: str) -> None:
        found.append({"name": of_ranks(ranks_of(result["flags"])) + name, **value, "unit": unit, **common})

    for arm, metric, name in (
        ("async", "p99_itl", "async.p99_itl_ratio"),
        ("async", "max_itl", "async.max_itl_ratio"),
        ("async", "throughput", "async.throughput_loss_pct"),
        ("sync", "p99_itl", "sync.p99_itl_ratio"),
    ):
        cells = {
            where: ratio[metric]
            for where, ratio in result["ratios_to_no_rebalancing"].items()
            if where.split()[0].endswith(f"-{arm}") and ratio[metric]["blocks"] > 1
        }
        if cells and metric == "throughput":
            where = min(cells, key=lambda name: cells[name]["ratio"])
            bounds = (("value", "ratio"), ("lower", "upper"), ("upper", "lower"))
            loss = {key: round(100 * (1 - cells[where][of]), 3) for key, of in bounds}
            add(name, loss, f"% of tokens/s without rebalancing, {where}")
        elif cells:
            where = max(cells, key=lambda name: cells[name]["ratio"])
            ratio = {key: cells[where][of] for key, of in (("value", "ratio"), ("lower", "lower"), ("upper", "upper"))}
            add(name, ratio, f"ratio to no rebalancing, {where}")
    commits = {
        arm: of["commit_ms_per_layer"]["p99"] for arm, of in result["rounds"].items() if "layers_committed" in of
    }
    if commits:
        where = max(commits, key=lambda arm: commits[arm])
        p99 = round(float(commits[where]), 4)
        add("async.commit_ms_per_layer.p99", {"value": p99, "lower": p99, "upper": p99}, f"ms, {where}")
    return found


def verification(log: str) -> dict[str, int]:
    """Checks of all ranks that found every slot right, and those that did not."""
    return {"right": log.count("verify: all"), "wrong": log.count("has wrong weights")}
