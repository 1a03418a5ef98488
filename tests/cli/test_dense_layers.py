"""``--dense-layers``: a dump with rows for dense layers, one without and a trace are the same in every command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sglang_eplb_affinity.cli import cli
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow, coactivation_of
from sglang_eplb_affinity.formats.affinity_entry import window_to_dump
from tests.simulate.conftest import SYSTEM, make_trace

torch = pytest.importorskip("torch", reason="SGLang's dumps are torch files")

DENSE, LAYERS = 2, 3
INPUTS = (("--trace", "trace.npz"), ("--dump", "with.pt"), ("--dump", "without.pt"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    made = make_trace(tokens=400)
    trace = RoutingTrace(made.topk_ids, made.num_experts)
    trace.save(path / "trace.npz")
    window = RoutingWindow.from_trace(trace)
    silent = np.zeros((DENSE, trace.num_experts), np.int64)
    assert window.tokens is not None
    tokens = np.concatenate([np.full((DENSE, *window.tokens.shape[1:]), -1, np.int16), window.tokens])
    whole = RoutingWindow(np.concatenate([silent, window.counts]), coactivation_of(tokens, trace.num_experts), tokens)
    for name, each in (("with.pt", whole), ("without.pt", window)):
        torch.save(
            {"logical_count": torch.from_numpy(each.counts)[None], "affinity": window_to_dump(each)}, path / name
        )
    partly = np.concatenate([silent[:1], window.counts])
    (path / "partly.json").write_text(json.dumps({"logical_count": partly.tolist()}))
    (path / "toy.yaml").write_text(
        SYSTEM.replace("layers: 3\n  dense_layers: 0", f"layers: 5\n  dense_layers: {DENSE}")
    )
    ExpertMap.contiguous(LAYERS + DENSE, 16, 20).save(path / "whole.json")
    ExpertMap.contiguous(LAYERS, 16, 20).save(path / "moe.json")
    return path


def run(folder: Path, *args: object) -> str:
    words = [str(folder / str(arg)) if (folder / str(arg)).is_file() else str(arg) for arg in args]
    result = CliRunner().invoke(cli, [*words, "--dense-layers", str(DENSE)])
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_plan_and_convert(folder: Path) -> None:
    for algorithm in ("deepseek", "affinity"):
        maps = []
        for given in INPUTS:
            out = folder / "planned.json"
            current = ("--current-map", "whole.json") if algorithm == "affinity" else ()
            run(folder, "plan", *given, "--gpus", 4, "--redundant", 4, "--effort", "fast", "--algorithm", algorithm,
                *current, "--out", out)  # fmt: skip
            maps.append(ExpertMap.load(out).physical_to_logical)
            assert len(maps[-1]) == LAYERS + DENSE
            run(folder, "convert", "--in", out, "--to", "tensorrt-llm", "--out", folder / "planned.yaml")
            run(folder, "convert", "--in", folder / "planned.yaml", "--to", "sglang", "--out", folder / "back.json")
            assert (ExpertMap.load(folder / "back.json").physical_to_logical[DENSE:] == maps[-1][DENSE:]).all()
        assert (maps[0] == maps[2]).all()
        if algorithm == "deepseek":  # affinity's search draws by the layer's number
            assert (maps[0][DENSE:] == maps[1][DENSE:]).all()


def test_evaluate_and_inspect(folder: Path) -> None:
    results, pictures = [], []
    for given in INPUTS:
        for placed in ("whole.json", "moe.json"):
            row = json.loads(run(folder, "evaluate", *given, "--map", placed, "--gpus", 4, "--format", "json"))
            results.append({key: row[key] for key in ("layers", "gpu_fanout", "load_max_over_mean")})
            seen = run(folder, "inspect", *given, "--map", placed, "--gpus", 4, "--format", "json")
            pictures.append([{**layer, "layer": 0} for layer in json.loads(seen)["per_layer"]])
    assert all(row == results[0] for row in results) and results[0]["layers"] == LAYERS
    loads = [[(layer["expert_load"], layer["gpu_load"]) for layer in picture] for picture in pictures]
    assert all(load == loads[0] for load in loads)


@pytest.mark.parametrize("command", ["simulate", "recommend"])
def test_simulate_and_recommend(folder: Path, command: str) -> None:
    found = []
    for given in INPUTS:
        out = folder / "simulated.json"
        run(folder, command, *given, "--topology", "toy.yaml", "--layers", 0, "--resamples", 2, "--phase", "decode",
            "--out", out)  # fmt: skip
        entry = json.loads(out.read_text())
        found.append(entry.get("results") or entry["recommendations"])
    assert found[0] == found[1] == found[2]


def test_numbers_that_cannot_be_are_refused_everywhere(folder: Path) -> None:
    topology = ("--topology", str(folder / "toy.yaml"))
    for command in (
        ("plan", "--gpus", "4", "--out", "-"), ("evaluate", "--gpus", "4", "--map", str(folder / "moe.json")),
        ("inspect",), ("simulate", *topology), ("recommend", *topology),
    ):  # fmt: skip
        simulated = command[0] in ("simulate", "recommend")
        name = folder / ("with.pt" if simulated else "partly.json")
        number = "3" if simulated else "2"
        args = [command[0], "--dump", str(name), *command[1:], "--dense-layers"]
        result = CliRunner().invoke(cli, [*args, number])
        assert isinstance(result.exception, InputError), (command, result.exception)
        assert f"--dense-layers {number}: but layer" in str(result.exception) and "has traffic" in str(result.exception)
        result = CliRunner().invoke(cli, [*args, "5"])
        assert isinstance(result.exception, InputError) and "layers in all" in str(result.exception)
