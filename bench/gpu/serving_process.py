"""sglang.bench_serving on prompts of its own, by bench.harness.client_process; two can load one server at once."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness.client_process import Job
from bench.harness.engine import ROOT
from bench.harness.process import stop_group


class ServingProcess:
    """Use as a context manager; ``begin`` one load, then ``wait`` for it. Its output goes to ``log``."""

    def __init__(self, log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.harness.client_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                cwd=ROOT,
                start_new_session=True,
            )
        self._replies: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> ServingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        stop_group(self._process)

    def wait_until_ready(self, seconds: float) -> None:
        self._next("not ready", seconds)

    def begin(self, arguments: Sequence[str]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(Job(list(arguments), str(self.log)).to_json().encode() + b"\n")
        self._process.stdin.flush()

    def wait(self, seconds: float) -> None:
        """Raises RuntimeError if the load failed or takes longer."""
        code = self._next("not done", seconds)["exit"]
        if code:
            raise RuntimeError(f"bench_serving: exit code {code}; see {self.log.name}")

    def _next(self, otherwise: str, seconds: float) -> dict[str, Any]:
        try:
            reply = self._replies.get(timeout=seconds)
        except queue.Empty:
            raise RuntimeError(f"bench_serving: {otherwise} after {seconds:.0f} s") from None
        if "ended" in reply:
            raise RuntimeError(f"bench_serving: ended; see {self.log.name}")
        return reply

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(json.loads(line))
        self._replies.put({"ended": True})
