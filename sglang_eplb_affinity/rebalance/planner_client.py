"""The parent's side of the planner process: a time limit, and a new process after any failure."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pickle
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, cast

from sglang_eplb_affinity.rebalance.plan_round import PlanReply, PlanRequest, PlanSettings
from sglang_eplb_affinity.rebalance.planner_main import HEADER, READY

logger = logging.getLogger(__name__)
START_SECONDS = 180.0
# A window has megabytes. Every piece written takes the interpreter lock once more from the forward passes.
PIPE_BYTES = 1 << 20
PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class PlannerFailed(Exception):
    """The planner process ended, or gave no answer in time; the text says which."""


class PlannerProcess:
    """One planner process, started at once and again after every failure.

    Its own process: a planner thread would take the interpreter lock from the thread that runs forward passes.
    """

    def __init__(self, settings: PlanSettings, limit_seconds: float, module: str = "") -> None:
        self._settings, self._limit = settings, limit_seconds
        self._module = module or "sglang_eplb_affinity.rebalance.planner_main"
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._lock = threading.Lock()
        self._closed = False
        self.starts = 0
        self._start()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def wait_until_ready(self, seconds: float) -> bool:
        """Whether the process has compiled or loaded its kernels within ``seconds``."""
        try:
            self._expect_ready(time.monotonic() + seconds)
            return True
        except PlannerFailed:
            return False

    def plan(self, request: PlanRequest) -> PlanReply:
        """Blocks until the answer is here; raises PlannerFailed. The next call finds a fresh process.

        The limit counts from when the process is ready, for which it has START_SECONDS.
        """
        try:
            if self._process is None or self._process.poll() is not None:
                self._restart()
            # A process that has just been started may still load or compile its kernels.
            self._expect_ready(time.monotonic() + max(self._limit, START_SECONDS))
            deadline = time.monotonic() + self._limit
            self._send(pickle.dumps(request, protocol=5), deadline)
            return cast(PlanReply, pickle.loads(self._receive(deadline)))
        except PlannerFailed:
            self._restart()
            raise

    def close(self) -> None:
        self._closed = True
        self._stop()

    def _start(self) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        with contextlib.suppress(OSError, AttributeError):  # beyond what a user may have, or not Linux
            fcntl.fcntl(self._process.stdin, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._ready = False
        self.starts += 1
        # A planner that ends at once is found by the first plan(), which has somebody to tell.
        with contextlib.suppress(PlannerFailed):
            self._send(pickle.dumps(self._settings, protocol=5), time.monotonic() + 1.0)

    def _restart(self) -> None:
        self._stop()
        if not self._closed:
            self._start()

    def _stop(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _expect_ready(self, deadline: float) -> None:
        if self._ready:
            return
        if self._receive(deadline) != READY:
            raise PlannerFailed("planner process said something unexpected")
        self._ready = True

    def _send(self, payload: bytes, deadline: float) -> None:
        process = self._process
        view = memoryview(HEADER.pack(len(payload)) + payload)
        try:
            if process is None or process.stdin is None:
                raise OSError
            while view:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise PlannerFailed(f"no plan within {self._limit:g} s")
                # A process that is stopped or stuck does not read: the pipe must not hold this thread.
                if _usable(process.stdin, selectors.EVENT_WRITE, min(left, 1.0)):
                    view = view[os.write(process.stdin.fileno(), view[:PIPE_BYTES]) :]
        except (OSError, ValueError) as error:
            raise PlannerFailed(f"planner process ended ({self._status()})") from error

    def _receive(self, deadline: float) -> bytes:
        (length,) = HEADER.unpack(self._read(HEADER.size, deadline))
        return self._read(length, deadline)

    def _read(self, count: int, deadline: float) -> bytes:
        process = self._process
        if process is None or process.stdout is None:
            raise PlannerFailed("planner process was stopped")
        parts = bytearray()
        while len(parts) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise PlannerFailed(f"no plan within {self._limit:g} s")
            try:
                readable = _usable(process.stdout, selectors.EVENT_READ, min(left, 1.0))
                chunk = os.read(process.stdout.fileno(), min(count - len(parts), 1 << 20)) if readable else None
            except (OSError, ValueError):
                chunk = b""
            if chunk == b"":
                raise PlannerFailed(f"planner process ended ({self._status()})")
            parts += chunk or b""
        return bytes(parts)

    def _status(self) -> str:
        if self._process is None:
            return "stopped"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)
        code = self._process.returncode
        return "still running" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"


def _usable(pipe: IO[bytes], event: int, seconds: float) -> bool:
    """Whether ``pipe`` can be read or written within ``seconds``; for descriptors above 1023 too, unlike select()."""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, event)
        return bool(selector.select(seconds))
