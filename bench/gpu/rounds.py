"""What a server's log says of its rebalances and of the checks of its weights."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from bench.figures.rebalance_log import WRONG_WEIGHTS, round_records

_UPSTREAM = re.compile(r"TP0.*\[EPLBManager\] rebalance end time=([\d.]+)s")


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"p50": np.percentile(values, 50), "p99": np.percentile(values, 99), "max": values.max()}


def rounds(log: str) -> dict[str, Any]:
    """How rebalances ended, and times of both kinds of them: ours and SGLang's own."""
    ours = [record for _, record in round_records(log)]
    upstream = [float(match) for match in _UPSTREAM.findall(log)]
    applied = [record for record in ours if record["result"] == "applied"]
    commits = [value for record in applied for value in record.get("commit_ms", [])]
    found: dict[str, Any] = {"results": {r: sum(x["result"] == r for x in ours) for r in {x["result"] for x in ours}}}
    if applied and commits:
        found |= {
            "seconds_to_last_commit": _spread(np.asarray([record["seconds"] for record in applied])),
            "passes": _spread(np.asarray([record["passes"] for record in applied])),
            "moved_mb_per_round": _spread(np.asarray([record["moved_bytes"] for record in applied]) / 1e6),
            "commit_ms_per_layer": _spread(np.asarray(commits)),
            "layers_committed": len(commits),
        }
    if upstream:
        found["upstream_seconds_per_rebalance"] = _spread(np.asarray(upstream))
        found["upstream_rebalances"] = len(upstream)
    return found


def verification(log: str) -> dict[str, int]:
    """Checks of all ranks that found every slot right, and those that did not."""
    return {"right": log.count("verify: all"), "wrong": log.count(WRONG_WEIGHTS)}
