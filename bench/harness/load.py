"""Load on servers: sglang.bench_serving in a process of its own for each cell, and plain requests for a probe."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from bench.harness.client_process import Job
from bench.harness.engine import ROOT
from bench.harness.process import last_error, scrub_file, stop_group
from bench.harness.profile import LoadConfig
from bench.harness.request_log import RequestLog
from bench.harness.server import HOST, Server
from bench.harness.workload import Workload, requests_of
from sglang_eplb_affinity.domain.files import write_atomically

_PROGRESS = re.compile(rb"(\d+)/(\d+) \[")
_START_TIMEOUT_S = 300.0  # imports take 10 s; minutes on a crowded machine


@dataclass(frozen=True)
class LoadResult:
    """``bench`` is bench_serving's own result, ``requests`` what it saw of each request; ``error`` if there is none."""

    bench: dict[str, Any]
    requests: RequestLog | None = None
    error: str | None = None


def load_arguments(load: LoadConfig, work: Workload, model: str, port: int, concurrency: int, seed: int) -> list[str]:
    """The bench_serving arguments of a cell; LoadClient adds where its result goes."""
    arguments = ["--backend", "sglang", "--host", HOST, "--port", str(port), "--model", model]
    arguments += ["--dataset-name", "custom", "--num-prompts", str(work.requests)]
    arguments += ["--ready-check-timeout-sec", "0", "--warmup-requests", "0"]
    arguments += ["--max-concurrency", str(concurrency), "--seed", str(seed)]
    return arguments + (["--request-rate", str(load.request_rate)] if load.request_rate else [])


class LoadClient:
    """Measures cells, one after another, through one load generator process; use as a context manager.

    The process starts with the first cell (or :meth:`start`) and again after it had to be stopped: a cell that hangs or
    breaks it costs no other cell.
    """

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._environment, self._log = environment, log
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def __enter__(self) -> LoadClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process if there is none; it imports SGLang while the caller does something else."""
        if self._process is not None and self._process.poll() is None:
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.harness.client_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(self._environment),
                cwd=ROOT,
                start_new_session=True,
            )
        self._replies = queue.Queue()
        threading.Thread(target=_read, args=(self._process.stdout, self._replies), daemon=True).start()

    @property
    def process_id(self) -> int | None:
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        if self._process is not None:
            stop_group(self._process, patience_s=2.0)
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None
            scrub_file(self._log)

    def run(
        self,
        arguments: Sequence[str],
        work: Workload,
        folder: Path,
        server: Server,
        timeout_s: float,
        progress: Callable[[int], None] = lambda done: None,
    ) -> LoadResult:
        """Run one cell's load; leaves bench.jsonl, requests.npz and client.log in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        raw, log, requests = folder / "raw.tmp", folder / "client.log", folder / "requests.npz"
        for stale in (raw, log, requests):
            stale.unlink(missing_ok=True)
        job = Job([*arguments, "--output-file", str(raw)], str(log), str(work.path), str(requests))
        error = self._measure(job, log, server, timeout_s, progress)
        scrub_file(log)
        try:
            data = json.loads(raw.read_text(encoding="utf-8"))
            seen = RequestLog.load(requests)
        except (OSError, ValueError, KeyError):
            return LoadResult(
                {}, None, error or f"load generator left no result: {last_error(log, 'its log is empty')}"
            )
        finally:
            raw.unlink(missing_ok=True)
        data.pop("server_info", None)  # names this machine's folders; environment.json has the flags
        write_atomically(folder / "bench.jsonl", (json.dumps(data, allow_nan=True) + "\n").encode())
        return LoadResult(data, seen, error)

    def _measure(
        self, job: Job, log: Path, server: Server, timeout_s: float, progress: Callable[[int], None]
    ) -> str | None:
        fresh = self._process is None or self._process.poll() is not None
        self.start()
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(job.to_json().encode() + b"\n")
            process.stdin.flush()
        except OSError:
            return self._broken()
        deadline = time.monotonic() + timeout_s + (_START_TIMEOUT_S if fresh else 0)
        while True:
            try:
                reply = self._replies.get(timeout=0.1)
            except queue.Empty:
                if time.monotonic() > deadline:
                    self.stop()
                    return f"load took longer than {timeout_s:.0f} s"
                if not server.alive:
                    self.stop()
                    return f"server ended under load: {last_error(server.log, 'its log is empty')}"
                if log.is_file() and (seen := _PROGRESS.findall(log.read_bytes()[-400:])):
                    progress(int(seen[-1][0]))
                continue
            if reply is None:
                return self._broken()
            if "exit" in reply:
                code = int(reply["exit"])
                return f"load generator exited with {code}: {last_error(log, 'its log is empty')}" if code else None

    def _broken(self) -> str:
        self.stop()
        return f"load generator ended: {last_error(self._log, 'its log is empty')}"


def _read(pipe: Any, replies: queue.Queue[dict[str, Any] | None]) -> None:
    """Lines of the load generator into the queue; None at its end."""
    try:
        for line in pipe:
            replies.put(json.loads(line))
    except ValueError:
        pass
    replies.put(None)


def warm_up(
    measure: Callable[[], float | None], rounds: int, moved: Callable[[], bool], in_time: Callable[[], bool]
) -> int:
    """Load a server in rounds until its ITL is flat and, for an arm with EPLB, experts have ``moved``.

    ``measure`` runs a round and gives its median ITL (None if it failed). Flat: within 10 % of the round before. At
    least two rounds, at most ``rounds``, none when it is no longer ``in_time``. Returns the number of rounds.
    """
    last: float | None = None
    for done in range(1, rounds + 1):
        if not in_time():
            return done - 1
        took = measure()
        flat = last is not None and took is not None and abs(took - last) <= 0.1 * last
        if flat and moved():
            return done
        last = took
    return rounds


def send_all(server: Server, work: Workload, concurrency: int) -> None:
    """Send plain requests, ``concurrency`` at a time. Raises OSError when one fails."""
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(lambda request: _generate(server, request.prompt, request.output_tokens), requests_of(work.path)))


def _generate(server: Server, prompt: str | list[int], output_tokens: int) -> None:
    sampling = {"temperature": 0.0, "max_new_tokens": output_tokens, "ignore_eos": True}
    body = {"text" if isinstance(prompt, str) else "input_ids": prompt, "sampling_params": sampling}
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}/generate", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=load_timeout_s(output_tokens)) as response:
        response.read()


def load_timeout_s(output_tokens: int) -> float:
    """Generous: a second a token, and a minute for the first."""
    return 60.0 + output_tokens


def own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The load generator's environment: the server's, on this checkout's modules."""
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    return cast(dict[str, str], {**environment, "PYTHONPATH": path})
