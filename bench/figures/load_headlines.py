"""Headline figures of a profile's further loads: full prefill passes, common decoding, requests that just arrive."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from bench.figures.compare import block_ratios, compare
from bench.figures.stats import noise_floor_pct
from bench.harness.links import Link
from bench.harness.profile import DECODE, PREFILL, REQUESTS, ServerConfig
from bench.harness.run_folder import RunPlan

Row = tuple[str, dict[str, Any]]

_METRICS = {
    REQUESTS: {"p50_ttft_ms": "p50_ttft", "p90_tpot_ms": "p90_tpot", "p95_itl_ms": "p95_itl", "qps": "qps"},
    PREFILL: {"full_prefill_ms": "full_prefill"},
    DECODE: {"decode_step_ms": "decode_step", "p90_tpot_ms": "p90_tpot", "p95_itl_ms": "p95_itl"},
}
# The figures by which the use of replicas is known: name, load, arms (the first that was measured), metric, baseline.
# LINK stands for the run's link; a name without it is taken over the GPUs' own link only: `bench.decode` in low-latency
# mode alone, as on a decode server, `decode.primaries` in auto mode.
_MANY = ("cover-balanced-32", "primary-32", "cover-32")
_NAMED = (
    ("bench.replicas.LINK.full_prefill", PREFILL, _MANY, "full_prefill_ms", "vanilla"),
    ("bench.decode.p90_tpot", DECODE, ("primary", "affinity"), "p90_tpot_ms", "vanilla"),
    ("decode.primaries.tpot", DECODE, ("primary",), "p90_tpot_ms", "vanilla"),
    ("decode.primaries.tpot", DECODE, ("primary",), "p90_tpot_ms", "none"),
)
_PRIMARIES_AT = 32  # requests a GPU


def figures_of_loads(frame: pd.DataFrame, plan: RunPlan, prefix: str) -> list[Row]:
    """``prefix``.LOAD.ARM.METRIC_ratio_to_BASELINE for every arm but the A/A one, LOAD with its concurrency where it
    has several; the named figures; and the noise floor of each load where the run has an A/A arm."""
    found: list[Row] = []
    for name in filter(None, plan.loads):
        rows, load = frame[frame["load"] == name], plan.profile.loads[name]
        metrics = _METRICS.get(load.kind, {})
        for level, cells in rows.groupby("concurrency"):
            where = f"{name}{level}" if len(load.concurrency) > 1 else name
            found += _ratios(cells, metrics, f"{prefix}.{where}", plan)
            found += _named(cells, load.kind, int(level), plan)
        found += _noise(rows, list(metrics), f"{prefix}.{name}.noise_floor_pct", plan)
    return found


def runs_low_latency(server: ServerConfig) -> bool:
    """In DeepEP's low-latency mode alone."""
    return server.value("--deepep-mode") == "low_latency"


def _ratios(cells: pd.DataFrame, metrics: dict[str, str], prefix: str, plan: RunPlan) -> list[Row]:
    rows = pd.concat([compare(cells, baseline, list(metrics)) for baseline in ("vanilla", "none")])
    return [
        (f"{prefix}.{row['arm']}.{metrics[row['metric']]}_ratio_to_{row['baseline']}", _values(row, plan))
        for row in rows.to_dict("records")
        if row["arm"] != "vanilla-again"
    ]


def _named(cells: pd.DataFrame, kind: str, level: int, plan: RunPlan) -> list[Row]:
    link = Link.of(plan.profile)
    largest = level == max(c for load in plan.profile.loads.values() if load.kind == kind for c in load.concurrency)
    found: list[Row] = []
    for name, of, arms, metric, baseline in _NAMED:
        arm = next((arm for arm in arms if arm in set(cells["arm"])), None)
        at = level == _PRIMARIES_AT * plan.profile.server.ranks if name.startswith("decode.") else largest
        if of != kind or arm is None or not at or ("LINK" not in name and link.emulated):
            continue
        if kind == DECODE and runs_low_latency(plan.profile.server) != name.startswith("bench."):
            continue
        for row in compare(cells[cells["arm"].isin((arm, baseline))], baseline, [metric]).to_dict("records"):
            found.append((f"{name.replace('LINK', link.name)}_ratio_to_{baseline}", _values(row, plan)))
    return found


def _noise(rows: pd.DataFrame, metrics: list[str], name: str, plan: RunPlan) -> list[Row]:
    noise = block_ratios(rows, "vanilla-again", "vanilla", metrics) if len(rows) else []
    if not noise:
        return []
    floor = round(noise_floor_pct(noise), 4)
    return [(name, {"value": floor, "lower": floor, "upper": floor, "unit": "%", "kind": Link.of(plan.profile).kind})]


def _values(row: dict[str, Any], plan: RunPlan) -> dict[str, Any]:
    """One block has no interval."""
    alone = math.isnan(row["lower"])
    ratio, lower, upper = (round(float(row["ratio" if alone else key]), 6) for key in ("ratio", "lower", "upper"))
    return {"value": ratio, "lower": lower, "upper": upper, "unit": "ratio", "kind": Link.of(plan.profile).kind}
