"""A wrong --out is refused in one line before anything is measured."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness.engine import ROOT
from bench.harness.output_paths import result_file, result_folder

FILES = ["bench.micro.forced_routing", "bench.gpu.kernel_times", "bench.gpu.kernel_tuning", "bench.gpu.rebalance_check"]


@pytest.mark.parametrize("module", [*FILES, "bench.micro.deepep.__main__"])
def test_a_folder_is_no_result_file(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry = ["--dry-run"] if "deepep" in module else []
    assert _exit_code(module, ["--out", str(tmp_path), *dry]) == 2
    assert f"{tmp_path} is a folder; name a file" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", [["bench.planner"], ["bench.capacity", "all"], ["bench.capacity", "docs"]])
def test_commands_with_result_folders_refuse_a_file_too(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    done = subprocess.run(
        [sys.executable, "-m", *command, "--out", str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and f"{path} is a file; name a folder" in done.stderr.splitlines()[-1], done.stderr
    assert path.read_bytes() == b""


def test_folders_that_are_not_there_yet_are_left_to_the_run(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    assert result_file(str(new / "out.json")) == new / "out.json" and result_folder(str(new)) == new
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match="file is a file; name a folder"):
        result_file(str(tmp_path / "file" / "out.json"))


def _exit_code(module: str, arguments: list[str]) -> int:
    try:
        return int(importlib.import_module(module).main(arguments))
    except SystemExit as end:
        return int(end.code or 0)
