"""Headline figures of a run, as entries for results/summary.json."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from bench.figures.compare import block_ratios, compare
from bench.figures.cost_headlines import figures_of_costs
from bench.figures.load_headlines import figures_of_loads, runs_low_latency
from bench.figures.metrics import PLACEMENT
from bench.figures.stats import noise_floor_pct
from bench.harness.links import Link
from bench.harness.run_folder import RunFolder, RunPlan
from bench.publish.sections import HEADLINE
from bench.publish.summary import Figure, of_ranks
from bench.publish.table import main_load, tidy
from sglang_eplb_affinity.domain.errors import InputError

_RATIOS = {
    "p50_ttft_ms": "p50_ttft_ratio_to_vanilla",
    "p90_tpot_ms": "p90_tpot_ratio_to_vanilla",
    "p95_itl_ms": "p95_itl_ratio_to_vanilla",
    "qps": "qps_ratio_to_vanilla",
    "full_prefill_ms": "full_prefill_ratio_to_vanilla",
}
# Arms whose ratios are headline figures, and what their names begin with.
_NAMED = {
    "affinity": "",
    "cover": "cover.",
    "cover-balanced": "cover-balanced.",
    "cover-32": "cover-32.",
    "cover-balanced-32": "cover-balanced-32.",
}
_PLACEMENT_UNITS = {
    "balancedness": "mean/max load",
    "gpu_fanout": "GPUs per token",
    "node_fanout": "nodes per token",
    "remote_gpu_copies": "copies to other GPUs per token",
    "remote_node_copies": "copies to other nodes per token",
}


def figures_of_run(folder: RunFolder, plan: RunPlan, prefix: str) -> list[Figure]:
    """Entries named ``prefix``.NAME; raises InputError when no row counts.

    ``ARM.balancedness``, ``ARM.gpu_fanout``, ``ARM.node_fanout``: the placement served, median over rows, interval
    from the least to the largest row. On GPUs also the ratios of the affinity arm (and of ``cover``) to vanilla at the
    largest concurrency (interval over blocks) and, with an A/A arm, `bench.noise_floor_pct` (on 4 GPUs
    `ep4.bench.noise_floor_pct`), which is of all concurrencies, and that of each metric at the largest; further loads
    (load_headlines) and what EPLB costs by itself (cost_headlines). A CPU run gives no speeds: they mean nothing.
    """
    latest = folder.store.latest()
    records = [latest[cell] for cell in plan.cells() if cell in latest and not latest[cell].void]
    if not records:
        raise InputError(f"{folder.path}: no row counts, so there is no figure to take from it")
    frame = tidy(records)
    last = max(records, key=lambda record: record.finished)
    common = _common(last.provenance, folder.environment(), last.finished)
    named = [(f"{prefix}.{name}", values) for name, values in _placement(frame, plan)]
    if plan.profile.server.engine != "cpu":
        kind = Link.of(plan.profile).kind
        named += [(f"{prefix}.{name}", values) for name, values in _speeds(main_load(frame), kind)]
        noise = f"{of_ranks(plan.profile.server.ranks)}bench"
        named += [(f"{noise}.{name}", values) for name, values in _noise(main_load(frame), kind)]
        named += figures_of_loads(frame, plan, prefix) + figures_of_costs(frame, plan)
    return [Figure(name=name, **values, **common) for name, values in named]


def default_prefix(plan: RunPlan) -> str:
    """`bench.LINK`: `bench.nvlink`, `bench.emulated50`, `bench.cpu`; on more than 2 GPUs `ep4.bench.nvlink`. Where arms
    serve one map each, `bench.auto.LINK`; in low-latency mode alone, `bench.low_latency.LINK`; of a profile that only
    asks what EPLB costs, `bench.idle`."""
    server = plan.profile.server
    if "plain" in plan.profile.arms:
        of, link = "", "idle"
    else:
        of = "low_latency." if runs_low_latency(server) else "auto." if server.plan_trace else ""
        link = Link.of(plan.profile).name
    return f"{'' if server.engine == 'cpu' else of_ranks(server.ranks)}bench.{of}{link}"


_Row = tuple[str, dict[str, Any]]


def _common(provenance: dict[str, Any], environment: dict[str, Any], finished: str) -> dict[str, Any]:
    versions = dict(provenance["versions"])
    if provenance.get("uncommitted_changes"):
        versions["uncommitted_changes"] = "yes"
    return {
        "hardware": provenance["hardware"],
        "versions": versions,
        "commit": provenance["commit"],
        "date": finished,
        "command": environment["command"],
    }


def _placement(frame: pd.DataFrame, plan: RunPlan) -> list[_Row]:
    rows: list[_Row] = []
    for arm in plan.arms:
        own = frame[frame["arm"] == arm]
        for name in PLACEMENT:
            columns = [own[c].dropna() for c in (f"{name}_served", f"{name}_initial") if c in own]
            values = next((found for found in columns if len(found)), None)
            if values is None:
                continue
            kind = "emulated" if "node" in name and plan.profile.server.nodes > 1 else "measured"
            if plan.profile.server.plan_trace:  # computed on the replayed trace
                kind = "simulated"
            rows.append((f"{arm}.{name}", _values(values, _PLACEMENT_UNITS[name], kind)))
    return rows


def _values(values: pd.Series, unit: str, kind: str) -> dict[str, Any]:
    spread = {"value": values.median(), "lower": values.min(), "upper": values.max()}
    return {**{key: round(float(value), 6) for key, value in spread.items()}, "unit": unit, "kind": kind}


def _speeds(frame: pd.DataFrame, kind: str) -> list[_Row]:
    if frame.empty:
        return []
    largest = frame[frame["concurrency"] == frame["concurrency"].max()]
    found = compare(largest, "vanilla", list(_RATIOS))
    rows: list[_Row] = []
    for row in found[found["arm"].isin(_NAMED)].to_dict("records"):
        one_block = math.isnan(row["lower"])
        interval = {key: round(float(row["ratio" if one_block else key]), 6) for key in ("ratio", "lower", "upper")}
        values = {"value": interval["ratio"], "lower": interval["lower"], "upper": interval["upper"]}
        rows.append((_NAMED[row["arm"]] + _RATIOS[row["metric"]], {**values, "unit": "ratio", "kind": kind}))
    return rows


def _noise(frame: pd.DataFrame, kind: str) -> list[_Row]:
    rows: list[_Row] = []
    if frame.empty:
        return rows
    largest = frame[frame["concurrency"] == frame["concurrency"].max()]
    single = [(f".{metric.removesuffix('_ms')}", largest, [metric]) for metric in _RATIOS if metric in frame]
    for name, of, metrics in [("", frame, list(HEADLINE)), *single]:
        if noise := block_ratios(of, "vanilla-again", "vanilla", metrics):
            floor = round(noise_floor_pct(noise), 4)
            unit = f"%, at {of['concurrency'].max()} concurrent" if name else "%"
            values = {"value": floor, "lower": floor, "upper": floor, "unit": unit, "kind": kind}
            rows.append((f"noise_floor_pct{name}", values))
    return rows
