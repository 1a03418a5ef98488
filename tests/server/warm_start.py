"""Servers forked from a process that has imported SGLang, which takes each that is started anew some 13 s of a core.

What runs in them is `python -m sglang.launch_server` with its flags, environment and log. Tests with plugins, and all
of the benchmark's, start the command itself.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest.mock import patch

from bench.engines.emulated_hosts import enter
from bench.harness.engine import cpu_environment

IMPORTED = ["sglang.srt.entrypoints.http_server", "sglang.srt.managers.data_parallel_controller"]


class WarmServer:
    """As much of subprocess.Popen as the harness needs; the process leads a group of its own."""

    def __init__(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str], cwd: Path, tenant: int | None = None
    ) -> None:
        """``tenant``: of the emulated host that it runs on."""
        self.args = list(arguments)
        self._process = _context().Process(target=_launch, args=(self.args, log, dict(environment), cwd, tenant))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with patch.dict(os.environ, cpu_environment(2)):
        forkserver.ensure_running()
    return context


def _launch(arguments: list[str], log: Path, environment: dict[str, str], cwd: Path, tenant: int | None) -> None:
    os.setsid()
    if tenant is not None:
        enter(tenant)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    sys.argv = ["sglang.launch_server", *arguments]
    assert IMPORTED[0] in sys.modules
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
