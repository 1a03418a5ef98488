"""Processes in a group of their own, so that a benchmark never leaves a server's workers behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from bench.harness.engine import ROOT


class Process(Protocol):
    """What stopping needs of subprocess.Popen; it leads its process group."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def start_group(
    command: Sequence[str], log: Path, environment: Mapping[str, str], cwd: Path = ROOT
) -> subprocess.Popen[bytes]:
    """Start ``command`` as leader of a new process group with both outputs appended to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=cwd,
            start_new_session=True,
        )


def stop_group(process: Process, patience_s: float = 10.0) -> None:
    """Ask the leader to end and take its workers along; then kill whatever is left of the group."""
    if process.poll() is None:
        process.terminate()
        resume_group(process)  # one that is paused would not hear it
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    deadline = time.monotonic() + patience_s
    while _signal_group(process.pid, signal.SIGKILL) and time.monotonic() < deadline:
        process.poll()  # reaps the leader, so that an empty group is seen as gone
        time.sleep(0.05)


def pause_group(process: Process) -> None:
    """Stop all processes of the group where they are, until :func:`resume_group`."""
    _signal_group(process.pid, signal.SIGSTOP)


def resume_group(process: Process) -> None:
    _signal_group(process.pid, signal.SIGCONT)


def _signal_group(group: int, sign: int) -> bool:
    """Whether the group still had a process to signal."""
    try:
        os.killpg(group, sign)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def scrub(text: str) -> str:
    """Take this machine's folders out of a log, so that a run can be published as it is."""
    folders = {str(ROOT): ".", sys.prefix: "$PREFIX", sys.base_prefix: "$BASE_PREFIX", str(Path.home()): "~"}
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder, folders[folder])
    # A progress bar rewrites its line; only what it showed last is kept.
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def scrub_file(path: Path) -> None:
    if path.is_file():
        path.write_text(scrub(path.read_bytes().decode("utf-8", "replace")), encoding="utf-8")


def last_error(log: Path, fallback: str) -> str:
    """The last line of a log that looks like an error, for a one-line message."""
    if not log.is_file():
        return fallback
    lines = [line.strip() for line in scrub(log.read_bytes().decode("utf-8", "replace")).splitlines() if line.strip()]
    # What SGLang tries after a crash fails too, and says so last.
    lines = [line for line in lines if "Pyspy failed" not in line]
    errors = [line for line in lines if "Error" in line or "error:" in line or "Exception" in line]
    return (errors or lines or [fallback])[-1][:300]
