"""The planner's benchmark on a small synthetic trace: tables and summary entries are complete and consistent."""

from __future__ import annotations

import csv
import json

import numpy as np
from click.testing import CliRunner

from bench.planner import loop_day
from bench.planner.__main__ import main
from bench.planner.quality import Case, Split
from bench.planner.rounds import round_rows
from bench.planner.synthetic import synthetic_trace
from bench.planner.torch_search import Problem, numba_search, torch_search
from bench.planner.tried import several_splits, tried_rows
from bench.publish.summary import parse_figures
from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig
from sglang_eplb_affinity.planner.budget import budget_for


def test_quality_and_curves(tmp_path):  # type: ignore[no-untyped-def]
    path = tmp_path / "small.npz"
    synthetic_trace(512, 1, 32, 4).save(path)
    args = ["--trace", str(path), "--part", "quality", "--part", "floor", "--case", "8x2", "--seeds", "1"]
    result = CliRunner().invoke(
        main, [*args, "--floor-scale", "1", "--out", str(tmp_path / "out")], catch_exceptions=False
    )
    assert result.exit_code == 0
    rows = list(csv.DictReader((tmp_path / "out" / "quality.csv").open()))
    assert {row["arm"] for row in rows} >= {"deepseek", "deepseek_hierarchical", "affinity fast", "affinity thorough"}
    for row in rows:
        assert float(row["gpu_fanout"]) >= float(row["node_fanout"]) >= 1
        assert row["arm"] != "deepseek" or float(row["gpu_fanout_ratio"]) == 1
    figures = parse_figures(json.loads((tmp_path / "out" / "summary_entries.json").read_text()), "summary_entries.json")
    assert "planner.small.8x2.node_fanout_ratio" in {figure.name for figure in figures}


def test_many_replicas_by_blocks_of_tokens_at_one_effort(tmp_path):  # type: ignore[no-untyped-def]
    path = tmp_path / "small.npz"
    synthetic_trace(512, 1, 32, 4).save(path)
    args = ["--trace", str(path), "--part", "replicas", "--case", "2x2-cover16", "--seeds", "1", "--repeats", "0"]
    more = ["--effort", "fast", "--split-tokens", "64", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(main, [*args, *more], catch_exceptions=False).exit_code == 0
    rows = {row["arm"]: row for row in csv.DictReader((tmp_path / "out" / "replicas.csv").open())}
    assert "affinity thorough" not in rows and not (tmp_path / "out" / "replicas_speed.csv").exists()
    assert float(rows["affinity fast"]["gpu_fanout"]) < float(rows["deepseek, cover"]["gpu_fanout"])
    parts = Split.load(str(path), 64)
    assert (parts.plan.topk_ids[:64] == RoutingTrace.load(path).topk_ids[:64]).all()
    assert (parts.test.topk_ids[:64] == RoutingTrace.load(path).topk_ids[64:128]).all()


def _eplb_and_affinity(day: str, domains: str) -> list[tuple[str, ...]]:
    return [(day, domains, arm, "0", "") for arm in ("deepseek", "affinity")]


def test_a_day_of_changing_domains(tmp_path, monkeypatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(loop_day, "WINDOWS", 4)
    monkeypatch.setattr(loop_day, "SHIFT_WEIGHTS", (loop_day.SHIFT_WEIGHTS[0], 50.0))
    monkeypatch.setattr(loop_day, "OTHER_DAYS", (1,))
    monkeypatch.setattr(loop_day, "TRIED", loop_day.TRIED[1:2])
    trace = synthetic_trace(2048, 1, 32, 4)
    assert trace.sequence is not None
    domain = (trace.sequence // 2 % 2).astype(np.int8)
    path = tmp_path / "small.npz"
    RoutingTrace(trace.topk_ids, 32, trace.sequence, domain, ("a", "b")).save(path)
    args = ["--trace", str(path), "--part", "loop", "--case", "8x2", "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(main, args, catch_exceptions=False).exit_code == 0
    rows = list(csv.DictReader((tmp_path / "out" / "loop.csv").open()))
    memory, usual = "affinity, with memory", str(loop_day.SHIFT_WEIGHTS[0])
    days = [(row["day"], row["domains"], row["arm"], row["windows"], row["shift_weight"]) for row in rows]
    assert days == [
        *_eplb_and_affinity("0", "changing"), ("0", "changing", memory, "3", usual),
        ("0", "changing", memory, "3", "50.0"), ("0", "changing", "affinity, next window's loads known", "", usual),
        *_eplb_and_affinity("0", "steady"), ("0", "steady", memory, "3", usual),
        *_eplb_and_affinity("1", "changing"), ("1", "changing", memory, "3", usual),
        ("1", "changing", memory, "8", "1.0"), ("1", "changing", "with memory, 95th percentile", "3", usual),
    ]  # fmt: skip
    assert [float(row["fanout_gain_kept_pct"]) for row in rows[:2]] == [0, 100] and rows[0][
        "load_ratio_to_eplb"
    ] == "1.0"
    assert (
        rows[2]["gpu_fanout"] != rows[3]["gpu_fanout"] != rows[4]["gpu_fanout"]
    )  # weight and foresight reach the search
    figures = parse_figures(json.loads((tmp_path / "out" / "summary_entries.json").read_text()), "summary_entries.json")
    found = {figure.name: figure for figure in figures}
    assert set(found) == {"loop.day.load_ratio_to_eplb", "loop.day.fanout_gain_kept_pct"}
    assert abs(found["loop.day.fanout_gain_kept_pct"].value - float(rows[2]["fanout_gain_kept_pct"])) < 1e-3


def test_rounds_that_need_a_gain_move_fewer_experts():
    trace = synthetic_trace(4096, 1, 32, 4)
    halves = several_splits(trace, "small")["even"]
    rows = round_rows(Split("small", halves.plan, halves.test), Case(4, 1, 8))
    assert {row["traffic"] for row in rows} == {"steady", "changing"} and len(rows) == 12
    steady = {row["arm"]: row for row in rows if row["traffic"] == "steady"}
    for rule in ("static", "cover"):
        free, held = (steady[f"affinity, {rule}, {arm}"] for arm in ("every plan taken", "minimum gain 0.02"))
        assert held["moved"] < free["moved"] and held["gpu_fanout_worst"] < steady[f"EPLB, {rule}"]["gpu_fanout_last"]


def test_splits_share_no_sequence_and_variants_change_the_plan():
    trace = synthetic_trace(1024, 1, 32, 4)
    splits = several_splits(trace, "small")
    assert len(splits) == 6
    for split in splits.values():
        plan_sequences, test_sequences = (set(part.sequence.tolist()) for part in (split.plan, split.test))
        assert not plan_sequences & test_sequences and len(plan_sequences | test_sequences) == 8
    rows = tried_rows(Split("small", splits["even"].plan, splits["even"].test), Case(8, 1), None)
    assert len({row["gpu_fanout_ratio"] for row in rows}) > 5
    assert all(row["gpu_fanout_ratio_min"] <= row["gpu_fanout_ratio"] <= row["gpu_fanout_ratio_max"] for row in rows)


def test_torch_search_is_a_fair_opponent():
    """It moves experts only, stays under the cap, and comes near the kernel's fan-out."""
    trace = synthetic_trace(1024, 2, 32, 4)
    problem = Problem.of(RoutingWindow.from_trace(trace), Topology(4), 1024)
    budget = budget_for(32, 32, PlannerConfig())
    found = {
        "start": problem.start,
        "torch": torch_search(problem, 200, budget.annealing.hot, budget.annealing.cold),
        "numba": numba_search(problem, budget, 1),
    }
    fanout = {}
    for name, expert_map in found.items():
        assert (np.sort(expert_map.physical_to_logical, axis=1) == np.arange(32)).all()
        load = np.take_along_axis(problem.counts, expert_map.physical_to_logical.astype(np.int64), 1)
        per_gpu = load.reshape(2, 4, -1).sum(2)
        assert (per_gpu.max(1) / per_gpu.mean(1) <= problem.load_cap + 1e-6).all()
        fanout[name] = measure(problem.tokens, expert_map, problem.topology, "dynamic", None).gpu_fanout.mean()
    assert fanout["start"] - fanout["torch"] > 0.8 * (fanout["start"] - fanout["numba"]) > 0
