"""Where inputs come from and outputs go: streams, inline JSON, Windows' text files, folders, devices, permissions."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from sglang_eplb_affinity.cli import cli
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.formats.responses import read_responses

MAP = ExpertMap.contiguous(2, 4, 4)


def run(*args: object, given: bytes | None = None) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], input=given)


def refusal(*args: object, given: bytes | None = None) -> str:
    result = run(*args, given=given)
    assert isinstance(result.exception, InputError), (result.output, result.exception)
    assert "\n" not in str(result.exception) and not result.stdout
    return str(result.exception)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    ids = np.array([[[0, 1], [2, 3]], [[1, 2], [0, 3]], [[0, 3], [0, 1]]], np.int16)
    RoutingTrace(ids, 4).save(tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


@pytest.fixture
def placed(tmp_path: Path) -> Path:
    MAP.save(tmp_path / "map.json")
    return tmp_path / "map.json"


def test_inputs_of_standard_input(trace: Path, placed: Path, tmp_path: Path) -> None:
    evaluate = ("evaluate", "--gpus", 2, "--format", "csv")
    expected = run(*evaluate, "--trace", trace, "--map", placed).stdout.split(",", 20)[2:]
    for given in (trace.read_bytes(), gzip.compress(trace.read_bytes())):
        result = run(*evaluate, "--trace", "-", "--map", placed, given=given)
        assert result.stdout.split(",", 20)[-1].split(",")[2:] == expected[-1].split(",")[2:], result.exception
    yaml = tmp_path / "map.yaml"
    assert run("convert", "--in", placed, "--to", "tensorrt-llm", "--out", yaml).exit_code == 0
    for path in (placed, yaml):
        assert "2 layers, 4 experts" in run("inspect", "--map", "-", given=path.read_bytes()).stdout
    back = ("convert", "--in", "-", "--to", "sglang", "--in-layers", "moe", "--dense-layers", 1, "--out", "-")
    result = run(*back, given=placed.read_bytes())  # looks at its input twice
    assert len(json.loads(result.stdout)["physical_to_logical_map"]) == 3
    assert "standard input: not JSON" in refusal("inspect", "--map", "-", given=b"[")
    assert "standard input: is empty" in refusal("inspect", "--map", "-", given=b" \n")


def test_outputs_on_standard_output(trace: Path) -> None:
    planned = run("plan", "--trace", trace, "--gpus", 2, "--effort", "fast", "--out", "-")
    assert ExpertMap.from_json(json.loads(planned.stdout)).num_slots == 4
    evaluate = ("evaluate", "--trace", trace, "--map", planned.stdout.strip(), "--gpus", 2, "--format", "json")
    assert json.loads(run(*evaluate, "--out", "-").stdout)["layers"] == 2
    message = refusal("simulate", "--trace", trace, "--topology", "qwen3-235b-h200", "--out", "-")
    assert "standard output has the table" in message


def test_inline_json(trace: Path) -> None:
    inline = json.dumps(MAP.to_json())
    result = run("evaluate", "--trace", trace, "--map", inline, "--gpus", 2, "--format", "json")
    assert json.loads(result.stdout)["slots"] == 4
    message = refusal("inspect", "--map", '{"physical_to_logical_map": [[0, 2]]}')
    assert message.startswith("inline JSON: ") and "no replica of logical expert 1" in message


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_text_files_of_windows(placed: Path, tmp_path: Path, encoding: str) -> None:
    text = json.dumps(MAP.to_json(), indent=1).replace("\n", "\r\n")
    placed.write_bytes(text.encode(encoding))
    assert (ExpertMap.load(placed).physical_to_logical == MAP.physical_to_logical).all()
    lines = tmp_path / "responses.jsonl"
    response = {"choices": [{"text": "a\u2028b", "routed_experts": [[[0, 1]], [[2, 1]]]}]}
    lines.write_bytes((json.dumps(response, ensure_ascii=False) + "\r\n").encode(encoding) * 1)
    assert read_responses(lines, 4).topk_ids.tolist() == [[[0, 1]], [[2, 1]]]


def test_an_output_is_no_input(trace: Path, placed: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (trace, placed)}
    link = tmp_path / "link.json"
    link.symlink_to(placed)
    for command in (
        ("plan", "--trace", trace, "--gpus", 2, "--out", trace),
        ("plan", "--trace", trace, "--gpus", 2, "--current-map", placed, "--out", link),
        ("evaluate", "--trace", trace, "--map", placed, "--gpus", 2, "--out", placed),
        ("convert", "--in", placed, "--to", "sglang", "--out", placed),
    ):
        assert "is an input of this command too" in refusal(*command)
    assert {path: path.read_bytes() for path in before} == before


def test_folders_missing_folders_and_permissions(trace: Path, placed: Path, tmp_path: Path) -> None:
    plan = ("plan", "--trace", trace, "--gpus", 2, "--effort", "fast", "--out")
    assert "the folder" in refusal(*plan, tmp_path / "no" / "map.json")
    assert "is a folder, but must be a file" in refusal(*plan, tmp_path)
    assert "is a folder, but must be a file" in refusal("inspect", "--map", tmp_path)
    assert "cannot be read (No such file" in refusal("inspect", "--trace", tmp_path / "no.npz")
    if os.geteuid():  # root may do anything
        placed.chmod(0)
        assert "cannot be read (Permission denied)" in refusal("inspect", "--map", placed)
        tmp_path.chmod(0o500)
        assert "cannot be written (Permission denied)" in refusal(*plan, tmp_path / "new.json")
        tmp_path.chmod(0o700)


def test_devices_are_written_to_and_links_stay(trace: Path, tmp_path: Path) -> None:
    plan = ("plan", "--trace", trace, "--gpus", 2, "--effort", "fast", "--out")
    pipe, target, link = tmp_path / "pipe", tmp_path / "target.json", tmp_path / "link.json"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert run(*plan, pipe).exit_code == 0
    assert ExpertMap.from_json(json.loads(os.read(reader, 1 << 16))).num_layers == 2
    os.close(reader)
    assert pipe.is_fifo()
    target.write_text("old")
    link.symlink_to(target)
    assert run(*plan, link).exit_code == 0
    assert link.is_symlink() and ExpertMap.load(target).num_layers == 2


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("plan", "--trace", "T", "--gpus", 2, "--redundant", 10**9, "--out", "-"), "--redundant 1000000000: 4"),
        (("plan", "--trace", "T", "--gpus", 10**9, "--out", "-"), "--gpus 1000000000: must be at most"),
        (("inspect", "--trace", "T", "--gpus", 10**9), "--gpus 1000000000: must be at most"),
        (("evaluate", "--trace", "T", "--map", "M", "--gpus", 3), "3 GPUs"),
    ],
)  # fmt: skip
def test_numbers_that_would_fill_memory(trace: Path, placed: Path, args: tuple[object, ...], told: str) -> None:
    assert told in refusal(*({"T": trace, "M": placed}.get(str(arg), arg) for arg in args))
    assert run("inspect", "--map", placed, "--dense-layers", 10**9).exit_code == 2


def test_domains_without_names(trace: Path, tmp_path: Path) -> None:
    ids = RoutingTrace.load(trace).topk_ids
    numbered = tmp_path / "numbered.npz"
    np.savez(numbered, topk_ids=ids, num_experts=4, domain=np.array([3, 700, 3]))
    text = run("inspect", "--trace", numbered).stdout
    assert "domain 3: 2 tokens" in text and "domain 700: 1 tokens" in text
    RoutingTrace.load(numbered).save(tmp_path / "again.npz")
    read = RoutingTrace.load(tmp_path / "again.npz")
    assert read.domain is not None and read.domain.tolist() == [3, 700, 3]
