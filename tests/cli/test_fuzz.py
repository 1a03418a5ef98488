"""Broken files at the command line: a result, or one line with exit code 2 and nothing written."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_eplb_affinity import cli
from tests.formats.files import EXPERTS, GPUS, KINDS, K, broken, kind_of, write_all
from tests.formats.test_fuzz import CONTENTS, PACKED

BROKEN_PER_FILE = 45
COMMANDS: dict[str, tuple[tuple[object, ...], ...]] = {
    "trace": (("inspect", "--trace", "FILE", "--gpus", GPUS, "--format", "json"),
              ("evaluate", "--trace", "FILE", "--map", "map.json", "--gpus", GPUS, "--out", "OUT.json")),
    "map": (("convert", "--in", "FILE", "--to", "sglang", "--dense-layers", 1, "--out", "OUT.json"),
            ("inspect", "--map", "FILE", "--gpus", GPUS),
            ("evaluate", "--trace", "trace.npz", "--map", "FILE", "--gpus", GPUS, "--out", "OUT.json")),
    "counts": (("inspect", "--dump", "FILE", "--gpus", GPUS),
               ("plan", "--dump", "FILE", "--gpus", GPUS, "--algorithm", "deepseek", "--out", "OUT.json")),
    "tokens": (("evaluate", "--dump", "FILE", "--map", "map.json", "--gpus", GPUS, "--out", "OUT.json"),
               ("inspect", "--dump", "FILE", "--format", "json")),
    "responses": ((
        "convert", "--in", "FILE", "--to", "trace", "--experts", EXPERTS, "--top-k", K, "--out", "OUT.npz"),),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("files")
    return folder, write_all(folder)


def check(arguments: tuple[object, ...], path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run ``main`` as a process would; True if it gave a result."""
    out = path.parent / "out"
    out.mkdir(exist_ok=True)
    names = {"FILE": str(path), **{name: str(folder / name) for name in ("map.json", "trace.npz")}}
    words = [names.get(str(word), str(out / str(word)) if str(word).startswith("OUT.") else str(word))
             for word in arguments]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["sglang_eplb_affinity", *words])
    with CliRunner().isolation() as (stdout, stderr, _):
        code: Any = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        told, said = stderr.getvalue().decode(errors="replace"), stdout.getvalue()
    written = os.listdir(out)
    if code == 0:
        assert bool(written) == any(str(word).startswith("OUT.") for word in arguments)
    else:
        errors = [line for line in told.splitlines() if not line.startswith("note: ")]
        assert code == 2 and len(errors) == 1 and errors[0].startswith("error: "), told
        assert not written and not said, (written, said)
    for name in written:
        assert not name.endswith(".tmp")
        (out / name).unlink()
    return code == 0


def test_broken_bytes(files: tuple[Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, valid = files
    rng = np.random.default_rng(2)
    results, inputs, start = 0, 0, time.monotonic()
    for name in (*KINDS, *PACKED):
        for number in range(BROKEN_PER_FILE):
            path = tmp_path / name
            path.write_bytes(broken(valid[name], rng))
            commands = COMMANDS[kind_of(name)]
            results += check(commands[number % len(commands)], path, folder, monkeypatch)
            inputs += 1
    assert inputs >= 800 and 0 < results < inputs
    assert time.monotonic() - start < 240


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(content=CONTENTS, suffix=st.sampled_from([".json", ".yaml", ".jsonl"]), kind=st.sampled_from(list(COMMANDS)))
def test_any_structure(
    files: tuple[Path, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory, content: Any, suffix: str, kind: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        check(COMMANDS[kind][0], path, files[0], patch)
