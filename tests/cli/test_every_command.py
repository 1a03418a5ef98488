"""Every command on every format: a result where the format says what the command needs, else one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from sglang_eplb_affinity.cli import cli
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.formats.maps import load_map
from tests.formats.files import ALL, EXPERTS, GPUS, KINDS, LAYERS, SLOTS, TOKENS, K, kind_of, write_all
from tests.simulate.conftest import SYSTEM

TOY = ("--topology", "TOY", "--layers", 1)
PLAN = ("--gpus", GPUS, "--effort", "fast", "--redundant", SLOTS - EXPERTS, "--out", "OUT.json")
COMMANDS: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {  # arguments, and the kinds that give a result
    "plan trace": (("plan", "--trace", "FILE", *PLAN), ("trace",)),
    "plan dump": (("plan", "--dump", "FILE", *PLAN), ("counts", "tokens")),
    "plan two dumps": (("plan", "--dump", "FILE", "--dump", "ours.pt", *PLAN), ("counts", "tokens")),
    "plan map": (("plan", "--trace", "trace.npz", "--current-map", "FILE", "--max-moves", 1, *PLAN), ("map",)),
    "evaluate trace": (("evaluate", "--trace", "FILE", "--map", "map.json", "--gpus", GPUS), ("trace",)),
    "evaluate dump": (("evaluate", "--dump", "FILE", "--map", "trt.yaml", "--gpus", GPUS), ("counts", "tokens")),
    "evaluate map": (("evaluate", "--trace", "trace.npz", "--map", "FILE", "--gpus", GPUS), ("map",)),
    "evaluate moved": (
        ("evaluate", "--dump", "ours.pt", "--map", "map.pt", "--current-map", "FILE", "--gpus", GPUS), ("map",),
    ),
    "inspect trace": (("inspect", "--trace", "FILE", "--gpus", GPUS, "--plot", "OUT.png"), ("trace",)),
    "inspect dump": (("inspect", "--dump", "FILE", "--format", "json"), ("counts", "tokens")),
    "inspect map": (("inspect", "--map", "FILE", "--gpus", GPUS), ("map",)),
    "convert sglang": (("convert", "--in", "FILE", "--to", "sglang", "--out", "OUT.pt"), ("map",)),
    "convert ascend": (
        ("convert", "--in", "FILE", "--to", "vllm-ascend", "--gpus", GPUS, "--out", "OUT.json"), ("map",),
    ),
    "convert tensorrt": (("convert", "--in", "FILE", "--to", "tensorrt-llm", "--out", "OUT.yaml"), ("map",)),
    "convert trace": (
        ("convert", "--in", "FILE", "--to", "trace", "--experts", EXPERTS, "--top-k", K, "--out", "OUT.npz"),
        ("responses",),
    ),
    "simulate trace": (("simulate", "--trace", "FILE", *TOY, "--resamples", 2, "--phase", "decode"), ("trace",)),
    "simulate dump": (("simulate", "--dump", "FILE", *TOY, "--resamples", 2, "--phase", "decode"), ("tokens",)),
    "simulate test trace": (
        ("simulate", "--trace", "trace.npz", "--test-trace", "FILE", *TOY, "--resamples", 2, "--phase", "prefill"),
        ("trace",),
    ),
    "recommend trace": (("recommend", "--trace", "FILE", *TOY, "--resamples", 2, "--phase", "prefill"), ("trace",)),
    "recommend dump": (("recommend", "--dump", "FILE", *TOY, "--resamples", 2, "--phase", "prefill"), ("tokens",)),
    "replay trace": (
        ("replay", "--trace", "FILE", *TOY, "--windows", 4, "--every", 1, "--tokens-per-gpu", 32), ("trace",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    write_all(path)
    (path / "toy.yaml").write_text(SYSTEM)
    return path


def run(arguments: tuple[object, ...], folder: Path, name: str, out: Path) -> Result:
    def path(argument: object) -> str:
        text = str(argument)
        if text in KINDS or text == "FILE":
            return str(folder / (name if text == "FILE" else text))
        if text == "TOY":
            return str(folder / "toy.yaml")
        return str(out / text) if text.startswith("OUT.") else text

    return CliRunner().invoke(cli, [path(argument) for argument in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_format_is_a_result_or_one_line(command: str, folder: Path, tmp_path: Path) -> None:
    arguments, accepted = COMMANDS[command]
    for name in KINDS:
        result = run(arguments, folder, name, tmp_path)
        written = sorted(path.name for path in tmp_path.iterdir())
        if kind_of(name) in accepted:
            assert result.exit_code == 0, (name, result.exception)
            assert bool(written) == any(str(argument).startswith("OUT.") for argument in arguments)
        else:
            assert isinstance(result.exception, InputError), (name, result.output, result.exception)
            assert name in str(result.exception) and "\n" not in str(result.exception)
            assert not written and not result.stdout, name
        for path in tmp_path.iterdir():
            path.unlink()


@pytest.mark.parametrize("name", [name for name in ALL if name.endswith(".gz")])
def test_packed_files_give_what_the_files_give(name: str, folder: Path, tmp_path: Path) -> None:
    tried = {"trace": "inspect trace", "map": "convert ascend", "counts": "inspect dump", "tokens": "inspect dump",
             "responses": "convert trace"}[kind_of(name)]  # fmt: skip
    found = []
    for each in (name, name.removesuffix(".gz")):
        result = run(COMMANDS[tried][0], folder, each, tmp_path)
        assert result.exit_code == 0, result.exception
        found.append((result.stdout, [path.read_bytes() for path in tmp_path.iterdir() if path.suffix == ".json"]))
    assert found[0] == found[1]


def test_what_is_converted_is_what_was_given(folder: Path, tmp_path: Path) -> None:
    start = ExpertMap.contiguous(LAYERS, EXPERTS, SLOTS).physical_to_logical
    ids = RoutingTrace.load(folder / "trace.npz").topk_ids
    for command, name in (
        ("convert sglang", "OUT.pt"),
        ("convert ascend", "OUT.json"),
        ("convert tensorrt", "OUT.yaml"),
    ):
        for given in ("map.json", "map.pt", "ascend.json", "trt.yaml"):
            assert run(COMMANDS[command][0], folder, given, tmp_path).exit_code == 0
            assert (load_map(tmp_path / name).physical_to_logical == start).all()
    for given in ("sglang.jsonl", "vllm.jsonl"):
        assert run(COMMANDS["convert trace"][0], folder, given, tmp_path).exit_code == 0
        read = RoutingTrace.load(tmp_path / "OUT.npz")
        assert (read.topk_ids == ids).all() and read.sequence is not None
        assert np.bincount(read.sequence).tolist() == [TOKENS // 2, TOKENS // 2]
