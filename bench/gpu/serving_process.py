"""sglang.bench_serving in a process that stays: SGLang is imported once, and two such processes can load one server.

python -m bench.gpu.serving_process      (reads one JSON list of bench_serving arguments per line)
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.engine import ROOT
from bench.process import stop_group

_MARK = "@@serving_process "


class ServingProcess:
    """Use as a context manager; ``begin`` one load, then ``wait`` for it. Its output goes to ``log``."""

    def __init__(self, log: Path, environment: Mapping[str, str]) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.serving_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=ROOT,
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self._marks: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> ServingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        stop_group(self._process)  # type: ignore[arg-type]

    def wait_until_ready(self, seconds: float) -> None:
        self._expect("ready", seconds)

    def begin(self, arguments: Sequence[str]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(list(arguments)) + "\n")
        self._process.stdin.flush()

    def wait(self, seconds: float) -> None:
        """Raises RuntimeError if the load failed or takes longer."""
        self._expect("done", seconds)

    def _expect(self, wanted: str, seconds: float) -> None:
        try:
            found = self._marks.get(timeout=seconds)
        except queue.Empty:
            raise RuntimeError(f"bench_serving: not {wanted} after {seconds:.0f} s") from None
        if found != wanted:
            raise RuntimeError(f"bench_serving: {found}; see {self._log.name}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("a") as log:
            for line in self._process.stdout:
                if line.startswith(_MARK):
                    self._marks.put(line[len(_MARK) :].strip())
                else:
                    log.write(line)
                    log.flush()
        self._marks.put("ended")


def main() -> None:
    from sglang.benchmark.serving import cli_main

    print(_MARK + "ready", flush=True)
    for line in sys.stdin:
        sys.argv = ["bench_serving", *json.loads(line)]
        began = time.monotonic()
        try:
            cli_main()
            print(f"\n{_MARK}done", flush=True)
        except (Exception, SystemExit) as error:
            text = str(error).splitlines()
            print(f"\n{_MARK}failed after {time.monotonic() - began:.0f} s: {text[:1]}", flush=True)


if __name__ == "__main__":
    main()
