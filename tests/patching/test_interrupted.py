"""Ctrl-C, a kill and a full disk at every step of apply and unapply: the next one goes on, and nothing is lost."""

import errno
import os
import pathlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.patching import actions
from sglang_eplb_affinity.patching.actions import Project
from sglang_eplb_affinity.patching.series import Patch, apply_in
from tests.patching.conftest import ORIGINAL, make_project, site_files


class Killed(BaseException):
    """Stands for a process that ends: what would clean up behind it is kept from running, too."""


class Steps:
    """Counts what changes the disk below ``site`` and fails at step ``fail_at``, before or in the middle of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, site: Path, fail_at: int, how: str) -> None:
        self.count, self._fail_at, self._how, self._site, self.failed = 0, fail_at, how, str(site), False
        for owner, name in (
            (os, "replace"), (os, "chmod"), (pathlib.Path, "unlink"), (pathlib.Path, "mkdir"), (shutil, "rmtree"),
            (pathlib.Path, "write_bytes"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self._wrap(name, getattr(owner, name)))

    def _wrap(self, name: str, real: Callable) -> Callable:
        def step(path, *args, **kwargs):
            if not str(path).startswith(self._site):
                return real(path, *args, **kwargs)
            if self.failed and self._how == "killed":
                raise Killed
            self.count += 1
            if self.count == self._fail_at:
                self.failed = True
                if name == "write_bytes":
                    real(path, args[0][: len(args[0]) // 2])
                if name == "rmtree":
                    files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
                    os.unlink(files[0]) if files else None
                if self._how == "after" and name in ("replace", "unlink"):
                    real(path, *args, **kwargs)
                if self._how == "disk full" and name in ("write_bytes", "mkdir", "replace"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                raise Killed if self._how == "killed" else KeyboardInterrupt
            return real(path, *args, **kwargs)

        return step


def two(project: Project) -> str:
    (project.patches / "series").write_text("one.patch\ntwo.patch\n")
    return actions.apply(project)


def one(project: Project) -> str:
    (project.patches / "series").write_text("one.patch\n")
    return actions.apply(project)


@pytest.fixture
def remembered_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same few patches are applied to the same files some thousand times here: git does each once."""
    known: dict[tuple, dict[str, bytes | None]] = {}

    def read(folder: Path, patch: Patch) -> dict[str, bytes | None]:
        return {name: (folder / name).read_bytes() if (folder / name).is_file() else None for name in patch.files}

    def apply_once(folder: Path, patch: Patch, *, reverse: bool = False) -> None:
        key = (patch.text, reverse, tuple(read(folder, patch).items()))
        if key not in known:
            apply_in(folder, patch, reverse=reverse)
            known[key] = read(folder, patch)
        for name, data in known[key].items():
            if data is None:
                (folder / name).unlink(missing_ok=True)
            else:
                (folder / name).write_bytes(data)

    monkeypatch.setattr(actions, "apply_in", apply_once)


@pytest.mark.usefixtures("remembered_patches")
@pytest.mark.parametrize("how", ["ctrl-c", "after", "killed", "disk full"])
@pytest.mark.parametrize("before,action", [((), two), ((one,), two), ((two,), one), ((two,), actions.unapply)])
def test_every_step_can_be_the_last(tmp_path: Path, before, action, how: str) -> None:
    finished = make_project(tmp_path / "finished")
    two(finished)
    patched = site_files(finished)
    step = 0
    while True:
        step += 1
        project = make_project(tmp_path / str(step))
        for earlier in before:
            earlier(project)
        start = site_files(project)
        with pytest.MonkeyPatch.context() as patching:
            steps = Steps(patching, project.installation.site, step, how)
            message = ""
            try:
                action(project)
            except (KeyboardInterrupt, Killed):
                pass
            except (InputError, OSError) as error:
                message = str(error)
        if not steps.failed:
            break
        told = actions.status(project)
        assert "changed by someone else: none" in told, f"step {step}: {told}"
        if "nothing was changed" in message:
            visible = {name: text for name, text in site_files(project).items()}
            assert visible == start and "interrupted" not in told
        if "interrupted" in told:
            with pytest.raises(InputError, match="run `make apply` or `make unapply`"):
                actions.verify(project)
        else:
            actions.verify(project)
        for last in (two, actions.unapply) if step % 2 else (actions.unapply, two):
            last(project)
            assert site_files(project) == (patched if last is two else ORIGINAL), f"step {step}"
            assert "verified" in actions.verify(project)
        if step % 2:  # it ends taken back
            assert sorted(path.name for path in project.installation.site.iterdir()) == [
                "sglang", "sglang-0.5.17.dist-info",
            ]  # fmt: skip
    assert step > 12
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_a_full_disk_before_the_first_rename_changes_nothing(project: Project, monkeypatch) -> None:
    real = pathlib.Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == ".b.py.eplb-affinity.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, data)

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"b\.py.*: No space left on device; nothing was changed"):
        actions.apply(project)
    assert site_files(project) == ORIGINAL and not project.state.exists
