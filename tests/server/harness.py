"""Start patched SGLang servers on the CPU and ask them for greedy outputs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.engines.emulated_hosts import NAMES, EmulatedHosts
from bench.figures.rebalance_log import LogSummary, parse_log
from bench.harness.engine import ROOT, cpu_environment, own_models_only
from bench.harness.process import Process, last_error, start_group, stop_group
from tests.server.warm_start import WarmServer

TEXT = (
    "one two three four five six seven eight nine ten hello world expert parallel load balancing in mixture of models"
)
WORDS = (TEXT + " the quick brown fox jumps over a lazy dog").split(" ")
OUTPUT_TOKENS = 64
NUM_PROMPTS = 14


def found_by(module: str) -> dict[str, Any]:
    """What a module of tests.server finds where SGLang can be imported: a process of its own with the CPU engine."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.server.{module}"],
        env={**os.environ, **cpu_environment(1)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    return dict(json.loads(lines[0]))


@dataclass(frozen=True)
class ServerCase:
    """One server configuration; ``algorithm`` None is SGLang without EPLB."""

    model: str
    ep: int = 2
    redundant: int = 0
    dp_attention: bool = False
    algorithm: str | None = None
    iterations: int = 10
    extra: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        parts = [self.model, f"ep{self.ep}", f"r{self.redundant}", "dp" if self.dp_attention else "tp"]
        return "-".join([*parts, self.algorithm or "none"])

    @property
    def flags(self) -> list[str]:
        flags = ["--tp", str(self.ep), "--ep", str(self.ep)]
        if self.dp_attention:
            flags += ["--dp", str(self.ep), "--enable-dp-attention"]
        if self.algorithm:
            flags += ["--enable-eplb"] if self.algorithm != "affinity" else []
            flags += ["--eplb-algorithm", self.algorithm, "--ep-num-redundant-experts", str(self.redundant)]
            flags += ["--eplb-rebalance-num-iterations", str(self.iterations)]
            flags += ["--expert-distribution-recorder-buffer-size", str(self.iterations)]
        return [*flags, "--enable-expert-affinity-recorder", *self.extra]


@dataclass
class RunningServer:
    url: str
    log: Path
    process: Process

    def rebalances(self) -> LogSummary:
        return parse_log(self.log.read_text(errors="replace"))

    def get(self, path: str, timeout: float = 120) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
            return bytes(response.read())

    def post(self, path: str, body: dict[str, object] | None = None, timeout: float = 120) -> bytes:
        request = urllib.request.Request(
            self.url + path, json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return bytes(response.read())

    def generate(self, prompts: list[str], tokens: int = OUTPUT_TOKENS, concurrency: int = 14) -> list[dict]:
        """Greedy outputs: dicts with ``output_ids`` and ``meta_info``, in the order of the prompts."""

        def one(prompt: str) -> dict:
            sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
            return dict(json.loads(self.post("/generate", {"text": prompt, "sampling_params": sampling})))

        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(one, prompts))

    def generate_until(self, done: Callable[[], bool], count: int, seconds: float = 240) -> None:
        """Batches of ``count`` prompts until ``done``, at least one: rounds beside serving take what time they take."""
        deadline = time.monotonic() + seconds
        while True:
            self.generate(prompts(count))
            if done():
                return
            assert time.monotonic() < deadline, f"not seen within {seconds:.0f} s: {last_error(self.log, 'no log')}"


def prompts(count: int, seed: int = 0) -> list[str]:
    """Word salads of 5 to 60 words; the mix of words drifts, so that the best placement does too."""
    generator = random.Random(seed)
    out = []
    for index in range(count):
        start = index * len(WORDS) // max(count, 1)
        words = WORDS[start : start + 8] or WORDS
        out.append(" ".join(generator.choice(words) for _ in range(generator.randint(5, 60))))
    return out


def rounds(server: RunningServer) -> list[dict]:
    marker = "[eplb-affinity] rebalance {"
    lines = server.log.read_text(errors="replace").splitlines()
    return [json.loads("{" + line.split(marker, 1)[1]) for line in lines if marker in line]


class Traffic:
    """The same greedy requests again and again; every output must be what the first one was."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self.prompts = prompts(3)
        self.first = self.outputs()

    def outputs(self) -> list[list[int]]:
        results = self._server.generate(self.prompts, tokens=20, concurrency=1)
        return [result["output_ids"] for result in results]

    def until_round(self, number: int, seconds: float = 240) -> dict:
        deadline = time.monotonic() + seconds
        while not any(record["round"] == number for record in rounds(self._server)):
            assert time.monotonic() < deadline, f"round {number} did not end: {rounds(self._server)[-1:]}"
            assert self.outputs() == self.first
        return next(record for record in rounds(self._server) if record["round"] == number)


@contextmanager
def serve(
    model: Path,
    flags: list[str],
    log: Path,
    *,
    port: int,
    ranks: int,
    python_path: tuple[str, ...] = (),
    cwd: Path = ROOT,
    hosts: EmulatedHosts | None = None,
    **environment: str,
) -> Iterator[RunningServer]:
    """A server that is ready inside the context; its log is kept. With ``python_path`` its interpreter is a new one.

    With ``hosts`` it runs over both, half of its ranks on each, and the thread is in the network of the first.
    """
    arguments = ["--model-path", str(model), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--attention-backend", "torch_native", "--disable-cuda-graph", "--dtype", "float32"]
    arguments += ["--max-total-tokens", "8192", "--context-length", "2048", "--max-running-requests", "16"]
    arguments += ["--disable-radix-cache", "--random-seed", "1", *flags]
    env = {**os.environ, **cpu_environment(ranks), **own_models_only(), **environment}
    env["PYTHONPATH"] = os.pathsep.join([*python_path, env["PYTHONPATH"]])
    process: Process
    if hosts is not None:
        arguments += ["--nnodes", "2", "--dist-init-addr", f"{NAMES[0]}:{port + 1}", "--node-rank"]
        second = WarmServer([*arguments, "1"], log.with_name(f"{log.name}-host1"), env, cwd, hosts.tenant(1))
        try:
            first = WarmServer([*arguments, "0"], log, env, cwd, hosts.tenant(0))
            with hosts.network(0):
                yield from _ready(RunningServer(f"http://127.0.0.1:{port}", log, first))
        finally:
            stop_group(second, 1)
        return
    if python_path:
        process = start_group([sys.executable, "-m", "sglang.launch_server", *arguments], log, env, cwd)
    else:
        process = WarmServer(arguments, log, env, cwd)
    yield from _ready(RunningServer(f"http://127.0.0.1:{port}", log, process))


def _ready(server: RunningServer) -> Iterator[RunningServer]:
    try:
        _wait_until_ready(server, 480)  # half a minute on a quiet machine
        yield server
    finally:
        stop_group(server.process, 1)


def _wait_until_ready(server: RunningServer, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.process.poll() is None, f"server ended: {last_error(server.log, 'no log')}"
        try:
            with urllib.request.urlopen(server.url + "/health_generate", timeout=10) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"server not ready after {seconds:.0f} s: {last_error(server.log, 'no log')}")
