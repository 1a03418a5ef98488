"""Load on a server: sglang.bench_serving in its own process for each cell, and plain requests to warm up."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.engine import Engine
from bench.process import last_error, scrub_file, start_group, stop_group
from bench.profile import LoadConfig
from bench.server import HOST, Server
from bench.workload import Workload
from sglang_eplb_affinity.files import write_atomically

# What bench_serving writes for each request with --output-details.
_DETAILS = ("input_lens", "output_lens", "ttfts", "itls", "errors")
_PROGRESS = re.compile(rb"(\d+)/(\d+) \[")


@dataclass(frozen=True)
class LoadResult:
    """``bench`` is bench_serving's own result, ``requests`` its per-request details; ``error`` if there is none."""

    bench: dict[str, Any]
    requests: dict[str, list[Any]]
    error: str | None = None


def load_command(load: LoadConfig, work: Workload, model: str, port: int, concurrency: int, seed: int) -> list[str]:
    """The bench_serving command of a cell; it writes JSON to the file that run_load adds."""
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--host", HOST]
    command += ["--port", str(port), "--model", model, "--dataset-name", "custom", "--dataset-path", str(work.path)]
    command += ["--num-prompts", str(work.requests), "--sharegpt-output-len", str(load.output_tokens)]
    command += ["--max-concurrency", str(concurrency), "--warmup-requests", "0", "--seed", str(seed)]
    return command + (["--request-rate", str(load.request_rate)] if load.request_rate else [])


def run_load(
    command: Sequence[str],
    engine: Engine,
    folder: Path,
    server: Server,
    timeout_s: float,
    progress: Callable[[int], None] = lambda done: None,
) -> LoadResult:
    """Run one cell's load; leaves bench.jsonl, requests.jsonl.gz and client.log in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    raw, log = folder / "raw.tmp", folder / "client.log"
    for stale in (raw, log):
        stale.unlink(missing_ok=True)
    process = start_group([*command, "--output-file", str(raw), "--output-details"], log, engine.environment)
    try:
        error = _wait(process, log, server, timeout_s, progress)
    finally:
        stop_group(process)
        scrub_file(log)
    try:
        data = json.loads(raw.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return LoadResult({}, {}, error or f"load generator left no result: {last_error(log, 'its log is empty')}")
    finally:
        raw.unlink(missing_ok=True)
    return _split(data, folder, error)


def _wait(
    process: subprocess.Popen[bytes], log: Path, server: Server, timeout_s: float, progress: Callable[[int], None]
) -> str | None:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        if time.monotonic() > deadline:
            return f"load took longer than {timeout_s:.0f} s"
        if not server.alive:
            return f"server ended under load: {last_error(server.log, 'its log is empty')}"
        if seen := _PROGRESS.findall(log.read_bytes()[-400:]):
            progress(int(seen[-1][0]))
        time.sleep(0.25)
    if process.returncode:
        return f"load generator exited with {process.returncode}: {last_error(log, 'its log is empty')}"
    return None


def _split(data: dict[str, Any], folder: Path, error: str | None) -> LoadResult:
    """Keep the result as one JSON line and the requests compressed; drop the server's settings (they name this
    machine's folders, and environment.json has the flags) and the generated texts (random words of a test model)."""
    requests = {name: data.pop(name, []) for name in _DETAILS}
    for name in ("server_info", "generated_texts"):
        data.pop(name, None)
    write_atomically(folder / "bench.jsonl", (json.dumps(data, allow_nan=True) + "\n").encode())
    columns = zip(*(requests[name] for name in _DETAILS), strict=True)
    rows = [json.dumps(dict(zip(_DETAILS, row, strict=True))) for row in columns]
    write_atomically(folder / "requests.jsonl.gz", gzip.compress(("\n".join(rows) + "\n").encode(), mtime=0))
    return LoadResult(data, requests, error)


def warm_up(server: Server, prompts: Sequence[str], load: LoadConfig, concurrency: int, needs_rebalance: bool) -> int:
    """Send the same prompts in rounds until latency is flat and, for an arm with EPLB, experts have moved once.

    At least two rounds, at most ``load.warmup_rounds``. Flat: the median latency of a round is within 10 % of the
    round before. Returns the number of rounds.
    """
    if not prompts or load.warmup_rounds < 1:
        return 0
    last: float | None = None
    for done in range(1, load.warmup_rounds + 1):
        took = median(send_all(server, prompts, load.output_tokens, concurrency))
        flat = last is not None and abs(took - last) <= 0.1 * last
        if flat and (not needs_rebalance or server.summary().moved):
            return done
        last = took
    return load.warmup_rounds


def send_all(server: Server, prompts: Sequence[str], output_tokens: int, concurrency: int) -> list[float]:
    """Send plain requests, ``concurrency`` at a time; seconds that each took. Raises OSError when one fails."""
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda prompt: _generate(server, prompt, output_tokens), prompts))


def _generate(server: Server, prompt: str, output_tokens: int) -> float:
    """Seconds that one request took."""
    sampling = {"temperature": 0.0, "max_new_tokens": output_tokens, "ignore_eos": True}
    body = json.dumps({"text": prompt, "sampling_params": sampling}).encode()
    request = urllib.request.Request(f"{server.url}/generate", body, {"Content-Type": "application/json"})
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=load_timeout_s(output_tokens)) as response:
        response.read()
    return time.perf_counter() - start


def load_timeout_s(output_tokens: int) -> float:
    """Generous: a second a token, and a minute for the first."""
    return 60.0 + output_tokens
