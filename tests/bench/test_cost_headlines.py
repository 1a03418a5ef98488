"""Entries overhead.*, async.*, sync.* and auto.*: what a run of the profiles that only ask for costs becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bench.figures.cost_headlines import figures_of_costs
from bench.figures.headline import default_prefix
from bench.harness.profile import Profile
from bench.harness.run_folder import RunPlan
from bench.harness.schedule import CellKey
from bench.publish.summary import parse_figures
from bench.publish.table import tidy
from tests.bench.conftest import make_record

Metrics = Callable[[CellKey], dict[str, float]]
PROVENANCE: dict[str, Any] = {
    "hardware": "2 x GPU",
    "versions": {"sglang": "0.5.23"},
    "commit": "abcdef1",
    "date": "2026-01-01",
    "command": "python -m bench run",
}


def plan_of(name: str, blocks: int = 2, rate: float | None = None) -> RunPlan:
    profile = Profile.named(name)
    profile = profile if rate is None else profile.with_poisson(rate)
    levels, loads = profile.load.concurrency, ("", *profile.loads)
    return RunPlan(profile, profile.arms, levels, blocks, "random token ids", "", loads)


def figures(plan: RunPlan, metrics: Metrics) -> dict[str, dict[str, Any]]:
    records = [replace(make_record(cell), metrics=metrics(cell), placement={}) for cell in plan.cells()]
    rows = figures_of_costs(tidy(records), plan)
    parse_figures([{"name": name, **values, **PROVENANCE} for name, values in rows], "entries")
    return dict(rows)


def of_arms(name: str, **values: float) -> Metrics:
    """The metric ``name`` of each arm (underscores for dashes), a little more in block 1 for all of them."""
    return lambda cell: {name: values[cell.arm.replace("-", "_")] * (1 + 0.001 * cell.block)}


def test_losses_are_parts_of_the_tokens_that_would_have_come() -> None:
    plan = plan_of("h200-x2-idle")
    steps = of_arms("decode_step_ms", plain=5.0, vanilla_idle=5.05, affinity_idle=5.0, async_needless=5.1)
    found = figures(plan, lambda cell: {**steps(cell), "p50_tpot_ms": steps(cell)["decode_step_ms"]})
    assert found["overhead.low_latency.decode_loss_pct"]["value"] == 0
    upstream = found["overhead.low_latency.decode_loss_pct.upstream"]
    assert upstream["value"] == pytest.approx(100 * 0.05 / 5.05, rel=1e-3)
    assert upstream["unit"] == "% of tokens/s without EPLB, in decode passes"
    rounds = found["async.throughput_loss_pct"]
    assert rounds["value"] == pytest.approx(100 * 0.1 / 5.1, rel=1e-3)
    assert "one every 1000 passes (low_latency, decode, 256 concurrent)" in rounds["unit"]
    assert default_prefix(plan) == "bench.idle"


def test_normal_mode_has_whole_loads_prefills_and_decoding() -> None:
    rates = of_arms("qps", plain=100.0, vanilla_idle=98.0, affinity_idle=99.5)
    passes = of_arms("full_prefill_ms", plain=100.0, vanilla_idle=102.0, affinity_idle=101.0)
    found = figures(plan_of("h200-x2-idle-normal"), lambda cell: rates(cell) if not cell.load else passes(cell))
    assert found["overhead.normal.throughput_loss_pct"]["value"] == pytest.approx(0.5)
    assert found["overhead.normal.throughput_loss_pct.upstream"]["value"] == pytest.approx(2.0)
    assert found["overhead.normal.prefill_loss_pct"]["value"] == pytest.approx(100 * (1 - 1 / 1.01), rel=1e-3)


def test_stalls_are_the_worst_of_the_levels_and_their_interval_is_named() -> None:
    def metrics(cell: CellKey) -> dict[str, float]:
        worse = {"async-needless": 1.1, "vanilla-unrecorded": 2.0}.get(cell.arm, 1.0)
        worse = worse + 0.2 * (worse > 1 and cell.concurrency == 512)
        return {"p99_itl_ms": 10 * worse, "max_itl_ms": 20 * worse, "p50_tpot_ms": 8 * worse, "decode_step_ms": 8.0}

    plan = plan_of("h200-x2-stall")
    found = figures(plan, metrics)
    assert found["async.p99_itl_ratio"]["value"] == found["async.max_itl_ratio"]["value"] == 1.3
    assert found["sync.p99_itl_ratio"]["value"] == 2.2
    assert found["async.p99_itl_ratio"]["unit"].endswith("every 100 passes (low_latency, decode, 512 concurrent)")
    loss = found["async.every_100.throughput_loss_pct"]
    assert loss["value"] == pytest.approx(100 * (1 - 1 / 1.3), rel=1e-3) and "async.throughput_loss_pct" not in found
    four = replace(plan, profile=replace(plan.profile, server=replace(plan.profile.server, ranks=4)))
    assert set(figures(four, metrics)) == {f"ep4.{name}" for name in found}


def test_a_server_is_compared_in_each_mode() -> None:
    ttft = of_arms("p50_ttft_ms", auto_idle=10.0, normal_idle=11.0, low_latency_idle=100.0)
    tpot = of_arms("p50_tpot_ms", auto_idle=5.0, normal_idle=25.0, low_latency_idle=5.0)
    found = figures(plan_of("h200-x2-modes"), lambda cell: {**ttft(cell), **tpot(cell)})
    assert found["auto.ttft_ratio_to_low_latency"]["value"] == pytest.approx(0.1)
    assert found["auto.tpot_ratio_to_normal"]["value"] == pytest.approx(0.2)


def test_single_blocks_given_rates_and_emulated_links_make_no_figure() -> None:
    rates = of_arms("qps", plain=100.0, vanilla_idle=98.0, affinity_idle=90.0)
    assert figures(plan_of("h200-x2-idle-normal", blocks=1), rates) == {}
    plan = plan_of("h200-x2-idle-normal", rate=5.0)
    steady = figures(plan, lambda cell: {"qps": 50.0} if not cell.load else rates(cell))
    assert steady["overhead.normal.throughput_loss_pct"]["value"] == 0
    assert figures(replace(plan, profile=replace(plan.profile, link="emulated25")), rates) == {}


def test_commits_are_the_rows_99th_percentiles() -> None:
    plan = plan_of("h200-x2-stall")
    records = [
        replace(make_record(cell), placement={"commit_ms_p99": 0.3 + 0.1 * cell.block if "async" in cell.arm else None})
        for cell in plan.cells()
    ]
    found = dict(figures_of_costs(tidy(records), plan))["async.commit_ms_per_layer.p99"]
    assert (found["value"], found["lower"], found["upper"]) == (0.3, 0.3, 0.4)
