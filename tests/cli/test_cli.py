"""The command line as users run it: files in, files out, one line and exit code 2 for bad input."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from sglang_eplb_affinity.cli import cli
from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.recorded_map import MapOrigin, ServedModel, save_recorded_map
from tests.planner.windows import skewed_tokens


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    tokens = skewed_tokens(np.random.default_rng(5), 3, 600, 16, 4)
    path = tmp_path / "trace.npz"
    sequence = np.arange(600, dtype=np.int32) // 50
    RoutingTrace(tokens.transpose(1, 0, 2).copy(), 16, sequence).save(path)
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=True)


def plan_map(trace: Path, out: Path, *extra: object) -> Result:
    return run("plan", "--trace", trace, "--gpus", 4, "--nodes", 2, "--effort", "fast", "--out", out, *extra)


@pytest.mark.parametrize("algorithm", ["affinity", "deepseek", "deepseek_hierarchical"])
@pytest.mark.parametrize("redundant", [0, 4])
def test_plan_then_evaluate(trace, tmp_path, algorithm, redundant):  # type: ignore[no-untyped-def]
    out = tmp_path / "map.json"
    result = plan_map(trace, out, "--algorithm", algorithm, "--redundant", redundant)
    assert result.exit_code == 0, result.output
    assert ExpertMap.load(out).physical_to_logical.shape == (3, 16 + redundant)
    args = ("evaluate", "--trace", trace, "--map", out, "--gpus", 4, "--nodes", 2)
    data = json.loads(run(*args, "--dispatch", "cover", "--format", "json").stdout)
    row = data["results"][0]
    assert data["gpu_fanout"] == row["gpu_fanout"] == pytest.approx(np.mean(row["per_layer"]["gpu_fanout"]))
    assert 1 <= row["node_fanout"] <= row["gpu_fanout"] <= 4
    assert row["load_max_over_mean"] >= 1
    rows = list(
        csv.DictReader(
            io.StringIO(run(*args, "--dispatch", "static", "--dispatch", "dynamic", "--format", "csv").stdout)
        )
    )
    assert [r["dispatch"] for r in rows] == ["static", "dynamic"]


def test_affinity_beats_deepseek_on_its_own_trace(trace, tmp_path):  # type: ignore[no-untyped-def]
    fanout = {}
    for algorithm in ("affinity", "deepseek"):
        out = tmp_path / f"{algorithm}.json"
        assert plan_map(trace, out, "--algorithm", algorithm).exit_code == 0
        text = run("evaluate", "--trace", trace, "--map", out, "--gpus", 4, "--nodes", 2, "--format", "json").stdout
        fanout[algorithm] = json.loads(text)["gpu_fanout"]
    assert fanout["affinity"] < 0.95 * fanout["deepseek"]


def test_plans_held_to_their_95th_percentile_leave_more_layers_to_eplb(trace, tmp_path):  # type: ignore[no-untyped-def]
    left = []
    for held in ((), ("--p95-allowance", 0)):
        report = tmp_path / "report.json"
        assert plan_map(trace, tmp_path / "map.json", "--report", report, *held).exit_code == 0
        left.append(json.loads(report.read_text())["fallback"])
    assert left == [["", "", ""], ["", "search not better", ""]]
    wrong = plan_map(trace, tmp_path / "map.json", "--p95-allowance", -1)
    assert isinstance(wrong.exception, InputError) and "--p95-allowance -1" in str(wrong.exception)


def test_replanning_keeps_to_the_cap_and_counts_moves(trace, tmp_path):  # type: ignore[no-untyped-def]
    old, new, report = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "report.json"
    assert plan_map(trace, old, "--algorithm", "deepseek").exit_code == 0
    result = plan_map(trace, new, "--current-map", old, "--max-moves", 1, "--report", report)
    assert result.exit_code == 0, result.output
    text = run(
        "evaluate", "--trace", trace, "--map", new, "--current-map", old, "--gpus", 4, "--format", "json"
    ).stdout  # fmt: skip
    moved = json.loads(text)["results"][0]["per_layer"]["moved_experts"]
    assert moved == json.loads(report.read_text())["moved_experts"]
    assert max(moved) <= 4


@pytest.mark.parametrize("dense", [0, 1])
def test_conversions_come_back_unchanged(trace, tmp_path, dense):  # type: ignore[no-untyped-def]
    start = tmp_path / "start.json"
    rows = np.vstack([np.arange(20) % 16, np.random.default_rng(0).permutation(np.arange(20) % 16)]).astype(np.int32)
    ExpertMap(rows, 16).save(start)
    source = start
    for target, name in (
        ("tensorrt-llm", "m.yaml"), ("vllm-ascend", "m.json"), ("sglang", "m.pt"), ("sglang", "back.json"),
    ):  # fmt: skip
        if name.endswith(".yaml"):
            pytest.importorskip("yaml")
        if name.endswith(".pt"):
            pytest.importorskip("torch")
        out = tmp_path / name
        result = run("convert", "--in", source, "--to", target, "--gpus", 4, "--dense-layers", dense, "--out", out)
        assert result.exit_code == 0, result.output
        source = out
    assert (ExpertMap.load(source).physical_to_logical == rows).all()
    if dense:
        assert "  1: [" in (tmp_path / "m.yaml").read_text() and "  0: [" not in (tmp_path / "m.yaml").read_text()


def test_inspect_writes_pictures(trace, tmp_path):  # type: ignore[no-untyped-def]
    pytest.importorskip("matplotlib")
    out = tmp_path / "map.json"
    plan_map(trace, out, "--redundant", 4)
    for args in (("--trace", trace), ("--map", out, "--gpus", 4, "--nodes", 2)):
        picture = tmp_path / f"{args[0][2:]}.png"
        result = run("inspect", *args, "--plot", picture)
        assert result.exit_code == 0, result.output
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert "node 1 GPU 2" in result.output


def test_a_recorded_map_is_read_by_every_command(trace, tmp_path):  # type: ignore[no-untyped-def]
    out, recorded, plain = tmp_path / "map.json", tmp_path / "recorded.json", tmp_path / "plain.json"
    plan_map(trace, out)
    model = ServedModel("org/model", "Qwen3MoeForCausalLM", 3, 16, 4)
    figures = MapFigures(0.875, 2.5, 1.5, 1.875, 0.75)
    origin = MapOrigin(
        model, Topology(4, 2), 16, "affinity", "static", 7, "2026-11-21T12:00:00+00:00", "0.5.17", "0.1.0",
        "c0ffee", 1200, figures, figures,
    )  # fmt: skip
    save_recorded_map(recorded, ExpertMap.load(out, 16), origin)
    text = run("inspect", "--map", recorded).output
    for told in (
        "round 7 of affinity",
        "org/model",
        "c0ffee",
        "balancedness 0.8750",
        "4 GPUs on 2 nodes",
        "node 1 GPU 2",
    ):
        assert told in text
    tables = [
        run("evaluate", "--trace", trace, "--map", path, "--gpus", 4, "--nodes", 2, "--format", "csv").output
        for path in (out, recorded)
    ]
    assert tables[0].replace("map.json", "") == tables[1].replace("recorded.json", "")
    # What an unpatched SGLang reads: it takes no key but this one.
    assert run("convert", "--in", recorded, "--to", "sglang", "--out", plain).exit_code == 0
    assert list(json.loads(plain.read_text())) == ["physical_to_logical_map"]
    recorded.write_text(recorded.read_text().replace('"map_checksum": "', '"map_checksum": "0'))
    assert "not the map that was recorded" in str(run("inspect", "--map", recorded).exception)


@pytest.mark.parametrize("command", ["plan", "evaluate", "convert", "inspect"])
def test_help_has_an_example(command):  # type: ignore[no-untyped-def]
    assert f"python -m sglang_eplb_affinity {command}" in run(command, "--help").output


def shell(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang_eplb_affinity", *map(str, args)], capture_output=True, text=True, check=False
    )


def bad(tmp_path: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    trace, out = tmp_path / "trace.npz", tmp_path / "map.json"
    broken, far, holes = tmp_path / "broken.npz", tmp_path / "far.npz", tmp_path / "holes.json"
    broken.write_bytes(b"no zip")
    np.savez(far, topk_ids=np.full((4, 3, 2), 16, np.int16), num_experts=16)
    holes.write_text(json.dumps({"physical_to_logical_map": [[0, 1, 2, 3] * 4] * 3}))
    evaluate = ("evaluate", "--gpus", 4)
    plan = ("plan", "--gpus", 4, "--out", out)
    return {
        "no such trace": ((*plan, "--trace", tmp_path / "none.npz"), "none.npz"),
        "broken trace": ((*plan, "--trace", broken), "broken.npz"),
        "id beyond the experts": ((*plan, "--trace", far), "far.npz"),
        "slots do not divide": ((*plan, "--trace", trace, "--redundant", 3), "use 0 or 4"),
        "gpus do not divide": (("plan", "--trace", trace, "--gpus", 4, "--nodes", 3, "--out", out), "--nodes 3"),
        "map misses an expert": ((*evaluate, "--trace", trace, "--map", holes), "holes.json"),
        "unknown option": ((*plan, "--tracee", trace), "tracee"),
        "unknown algorithm": ((*plan, "--trace", trace, "--algorithm", "best"), "best"),
        "no output folder": (("plan", "--trace", trace, "--gpus", 4, "--out", tmp_path / "no" / "m.json"), "folder"),
        "no input": (plan, "--trace or --dump"),
        "not a dump": ((*plan, "--dump", broken), "broken.npz"),
        "max moves without a map": ((*plan, "--trace", trace, "--max-moves", 1), "current map"),
    }


@pytest.mark.parametrize("case", [
    "no such trace", "broken trace", "id beyond the experts", "slots do not divide", "gpus do not divide",
    "map misses an expert", "unknown option", "unknown algorithm", "no output folder", "no input", "not a dump",
    "max moves without a map",
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(trace, tmp_path, case):  # type: ignore[no-untyped-def]
    args, named = bad(tmp_path)[case]
    result = shell(*args)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert named in result.stderr
    assert not (tmp_path / "map.json").exists()


def test_input_error_reaches_the_caller_of_the_library(tmp_path):  # type: ignore[no-untyped-def]
    with pytest.raises(InputError):
        ExpertMap.load(tmp_path / "none.json")


def test_plan_within_a_memory_budget_and_evaluate_without_a_rank(trace, tmp_path):  # type: ignore[no-untyped-def]
    out = tmp_path / "auto.json"
    base = ("plan", "--trace", trace, "--gpus", 4, "--effort", "fast", "--out", out)
    done = run(*base, "--redundant", "auto", "--memory-gb", 1, "--expert-mb", 5, "--survive", "rank")
    assert done.exit_code == 0 and "<- knee, taken" in done.output and "surviv" in done.output
    lost = run("evaluate", "--trace", trace, "--map", out, "--gpus", 4, "--without-rank", 1, "--format", "json")
    assert lost.exit_code == 0 and "tokens_hit" in lost.output and "rest_load_max_over_mean" in lost.output
    for wrong, flag in (
        ((*base, "--redundant", "auto"), "--memory-gb"),
        ((*base, "--redundant", "-4"), "--redundant -4"),
        (("evaluate", "--trace", trace, "--map", out, "--gpus", 4, "--without-rank", 4), "--without-rank 4"),
        (("evaluate", "--trace", trace, "--map", out, "--gpus", 4, "--without-node", 0), "no GPU would be left"),
    ):
        failed = run(*wrong)
        assert isinstance(failed.exception, InputError) and flag in str(failed.exception)


def test_plan_says_which_maps_of_eplb_allow_no_even_primaries(tmp_path: Path) -> None:
    trace = Path(__file__).parents[2] / "bench/data/tiny_moe_plan.npz"
    for algorithm, says in (("deepseek", True), ("affinity", False)):
        done = run(
            "plan", "--trace", trace, "--gpus", 8, "--redundant", 8, "--algorithm",
            algorithm, "--dispatch", "primary", "--effort", "fast", "--out", tmp_path / "map.json",
        )  # fmt: skip
        assert done.exit_code == 0
        assert ("6 of 6 layers allow no even choice" in done.output) == says
