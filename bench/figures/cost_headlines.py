"""What EPLB costs by itself: entries overhead.*, async.*, sync.* and auto.* from the arms that only ask for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd

from bench.figures.compare import compare
from bench.harness.links import Link
from bench.harness.profile import DECODE, PREFILL, REQUESTS, ServerConfig
from bench.harness.run_folder import RunPlan
from bench.publish.summary import of_ranks

Row = tuple[str, dict[str, Any]]
DEFAULT_INTERVAL = 1000  # passes between rebalances, SGLang's default
_INTERVAL, _MODE = "--eplb-rebalance-num-iterations", "--deepep-mode"


@dataclass(frozen=True)
class Cost:
    """``name`` with MODE for DeepEP's mode; ``arm`` against ``without``, by ``metric`` of the loads of one ``kind``.

    ``loss``: whether the figure is the part of the tokens that is lost, in per cent, or the ratio itself. ``of``: what
    the unit says; EVERY stands for the interval between rebalances.
    """

    name: str
    arm: str
    without: str
    kind: str
    metric: str
    of: str
    loss: bool = True


def _overhead(figure: str, kind: str, metric: str, of: str = "") -> tuple[Cost, Cost]:
    name, unit = f"overhead.MODE.{figure}", f"without EPLB{of}"
    return (
        Cost(name, "affinity-idle", "plain", kind, metric, unit),
        Cost(f"{name}.upstream", "vanilla-idle", "plain", kind, metric, unit),
    )


_ASYNC, _SYNC = ("async-needless", "affinity-idle"), ("vanilla-unrecorded", "vanilla-idle")
_ROUNDS = "without rounds, one EVERY"
COSTS = (
    *_overhead("throughput_loss_pct", REQUESTS, "qps"),
    *_overhead("decode_loss_pct", DECODE, "decode_step_ms", ", in decode passes"),
    *_overhead("prefill_loss_pct", PREFILL, "full_prefill_ms", ", in full prefill passes"),
    Cost("async.throughput_loss_pct", *_ASYNC, DECODE, "p50_tpot_ms", _ROUNDS),
    Cost("async.p99_itl_ratio", *_ASYNC, DECODE, "p99_itl_ms", _ROUNDS, loss=False),
    Cost("async.max_itl_ratio", *_ASYNC, DECODE, "max_itl_ms", _ROUNDS, loss=False),
    Cost("sync.p99_itl_ratio", *_SYNC, DECODE, "p99_itl_ms", _ROUNDS, loss=False),
    Cost("auto.ttft_ratio_to_low_latency", "auto-idle", "low-latency-idle", REQUESTS, "p50_ttft_ms", "", loss=False),
    Cost("auto.tpot_ratio_to_normal", "auto-idle", "normal-idle", REQUESTS, "p50_tpot_ms", "", loss=False),
)


def mode_of(server: ServerConfig) -> str:
    """DeepEP's mode that a profile's servers are started in; empty without one."""
    return dict(pairwise(server.flags)).get(_MODE, "")


def figures_of_costs(frame: pd.DataFrame, plan: RunPlan) -> list[Row]:
    """Names without the run's prefix; nothing over an emulated link, or from a single block.

    Where a figure was measured under several loads or at several concurrencies, the worst is taken, and its unit says
    which it was. A loss of throughput under rounds at another than the default interval has that in its name; latencies
    are of streams token by token alone.
    """
    if Link.of(plan.profile).emulated or frame.empty:
        return []
    prefix = of_ranks(plan.profile.server.ranks)
    rows = [(f"{prefix}{_name(cost, plan)}", values) for cost in COSTS if (values := _worst(cost, frame, plan))]
    return rows + _commits(frame, plan, prefix)


def _name(cost: Cost, plan: RunPlan) -> str:
    name = cost.name.replace("MODE", mode_of(plan.profile.server))
    interval = _interval(plan)
    if name == "async.throughput_loss_pct" and interval != DEFAULT_INTERVAL:
        return f"async.every_{interval}.throughput_loss_pct"
    return name


def _interval(plan: RunPlan) -> int:
    return int(dict(pairwise(plan.profile.server.eplb_flags)).get(_INTERVAL, DEFAULT_INTERVAL))


def _loads(cost: Cost, plan: RunPlan) -> Iterator[str]:
    for name in plan.loads:
        load = plan.profile.load_named(name)
        # What arrives at a given rate is answered at that rate, whatever it costs.
        if load.kind != cost.kind or load.request_rate:
            continue
        if "itl" not in cost.metric or load.token_streams:
            yield name


def _worst(cost: Cost, frame: pd.DataFrame, plan: RunPlan) -> dict[str, Any] | None:
    found: list[tuple[dict[str, float], str]] = []
    for name in _loads(cost, plan):
        pair = frame[(frame["load"] == name) & frame["arm"].isin((cost.arm, cost.without))]
        for row in compare(pair, cost.without, [cost.metric]).to_dict("records"):
            if not math.isnan(row["lower"]):
                level = f"{row['concurrency']} concurrent"
                found.append((_values(cost, row), f"{name}, {level}" if name else level))
    if not found:
        return None
    worst, where = max(found, key=lambda one: one[0]["value"])
    unit = " ".join(filter(None, ("% of tokens/s" if cost.loss else "ratio", cost.of)))
    unit = unit.replace("EVERY", f"every {_interval(plan)} passes")
    if "MODE" not in cost.name:
        where = ", ".join(filter(None, (mode_of(plan.profile.server), where)))
    return {
        **worst,
        "unit": f"{unit} ({where})" if len(found) > 1 or "MODE" not in cost.name else unit,
        "kind": "measured",
    }


def _values(cost: Cost, row: Mapping[str, Any]) -> dict[str, float]:
    values = [float(row[name]) for name in ("ratio", "lower", "upper")]
    if cost.loss and cost.kind == REQUESTS:
        values = [100 * (1 - ratio) for ratio in values]
    elif cost.loss:  # a pass that takes r times as long makes 1 / r of the tokens
        values = [100 * (1 - 1 / ratio) for ratio in values]
    value, *bounds = (round(number, 4) for number in values)
    return {"value": value, "lower": min(bounds), "upper": max(bounds)}


def _commits(frame: pd.DataFrame, plan: RunPlan, prefix: str) -> list[Row]:
    """How long asynchronous rounds stop serving for a layer: 99th percentile of a row; median over rows."""
    rows = frame[frame["valid"] & (frame["arm"] == "async-needless")]
    if "commit_ms_p99" not in rows or rows["commit_ms_p99"].count() < 2:
        return []
    values = rows["commit_ms_p99"].dropna()
    spread = {"value": values.median(), "lower": values.min(), "upper": values.max()}
    unit = f"ms, {mode_of(plan.profile.server)}, {plan.profile.server.ranks} GPUs"
    figures = {name: round(float(value), 4) for name, value in spread.items()}
    return [(f"{prefix}async.commit_ms_per_layer.p99", {**figures, "unit": unit, "kind": "measured"})]
