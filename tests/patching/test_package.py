"""The package beside SGLang: what installs it is known before SGLang is patched."""

import importlib.util
import sys
from pathlib import Path

import pytest

from sglang_eplb_affinity.patching import __main__ as command
from sglang_eplb_affinity.patching import package
from sglang_eplb_affinity.patching.actions import Project
from sglang_eplb_affinity.patching.upstream import Installation
from tests.patching.conftest import ORIGINAL, site_files


@pytest.fixture
def without_pip(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment as uv makes it; returns the folder that is all of PATH but git's."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else real(name, *rest))
    monkeypatch.setattr(Installation, "find", staticmethod(lambda: project.installation))
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setattr(package.shutil, "which", lambda name: str(tools / name) if (tools / name).is_file() else None)
    return tools


def fake_uv(tools: Path, code: int = 0) -> Path:
    uv, told = tools / "uv", tools / "told"
    uv.write_text(
        f'#!/bin/sh\necho "$@" >> {told}\nfailed={code}\n[ $failed = 0 ] || echo "error: no space" >&2\nexit $failed\n'
    )
    uv.chmod(0o755)
    return told


def run(project: Project, *arguments: str) -> int:
    return command.main([*arguments, "--patches", str(project.patches)])


def test_without_pip_and_uv_nothing_is_patched(project: Project, without_pip: Path, capsys) -> None:
    assert run(project, "apply", "--package", "here") == 2
    assert "has no pip, and no uv is on PATH" in capsys.readouterr().err
    assert site_files(project) == ORIGINAL and not project.state.exists


def test_uv_installs_and_removes_where_there_is_no_pip(project: Project, without_pip: Path, capsys) -> None:
    told = fake_uv(without_pip)
    assert run(project, "apply", "--package", "here", "--editable") == 0
    line = told.read_text()
    assert line.startswith(f"pip install -q --python {sys.executable} --no-deps") and line.endswith(" -e here\n")
    assert site_files(project) != ORIGINAL
    assert run(project, "unapply", "--package") == 0
    assert told.read_text().splitlines()[1] == f"pip uninstall -q --python {sys.executable} sglang-eplb-affinity"
    assert site_files(project) == ORIGINAL


def test_a_failed_installation_leaves_sglang_alone(project: Project, without_pip: Path, capsys) -> None:
    fake_uv(without_pip, code=1)
    assert run(project, "apply", "--package", "here") == 2
    error = capsys.readouterr().err
    assert "(error: no space); SGLang's files were left as they are" in error and error.count("\n") == 1
    assert site_files(project) == ORIGINAL and not project.state.exists


def test_unapply_gives_the_files_back_without_an_installer(project: Project, without_pip: Path, capsys) -> None:
    assert run(project, "apply") == 0
    assert run(project, "unapply", "--package") == 0
    assert "stays installed" in capsys.readouterr().out
    assert site_files(project) == ORIGINAL


def test_pip_is_used_where_it_is() -> None:
    assert importlib.util.find_spec("pip") is not None
    assert package.installer() == ([sys.executable, "-m", "pip", "--disable-pip-version-check"], [])
