"""The load generator: one process that imports sglang.bench_serving once and forks a child for each measurement.

    python -m bench.harness.client_process

Importing takes ten seconds, more than a row on a GPU does. Each measurement is still a process of its own: what one
leaves behind or breaks does not reach the next. One JSON object a line comes in (see :class:`Job`); one goes out when
the measurement is over: {"exit": code of the child}. At first a line {"ready": true}.

bench_serving runs as it is; with a workload, but for: prompts are prepared by bench.harness.workload, its texts are not
tokenised again, the pauses around its own warm-up are left out (there is no such warm-up), and its requests are kept in
full.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from bench.harness.request_log import RequestLog
from bench.harness.workload import requests_of

SAMPLE_S = 0.01
PAUSE_S = 1.0  # of bench_serving, between its warm-up and its load


@dataclass(frozen=True)
class Job:
    """``arguments`` of bench_serving; the files of its log, its prompts, and its requests (a RequestLog).

    Without ``workload`` and ``requests`` bench_serving makes its own prompts, and nothing is kept but what it writes.
    """

    arguments: Sequence[str]
    log: str
    workload: str | None = None
    requests: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class _NoTokenizer:
    """Prompts are prepared and counted already, and nobody asks how many tokens an answer would be once more."""

    def encode(self, text: str, **_: Any) -> tuple[()]:
        return ()


class _Clock:
    """bench_serving's `time`, without its pause."""

    perf_counter = staticmethod(time.perf_counter)
    time = staticmethod(time.time)

    @staticmethod
    def sleep(seconds: float) -> None: ...


class _Loop:
    """bench_serving's `asyncio`, without its pause of a second; arrivals are waited for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(seconds: float) -> None:
        if seconds != PAUSE_S:
            await asyncio.sleep(seconds)


def main() -> None:
    from sglang.benchmark import serving

    gc.collect()
    gc.freeze()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    replies.write('{"ready": true}\n')
    for line in sys.stdin:
        job = Job(**json.loads(line))
        child = os.fork()
        if child == 0:
            _measure(serving, job)
        _, status = os.waitpid(child, 0)
        replies.write(json.dumps({"exit": os.waitstatus_to_exitcode(status)}) + "\n")


def _measure(serving: Any, job: Job) -> NoReturn:
    code = 1
    try:
        log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        gc.disable()  # a row takes seconds; a collection in it would look like a stall of the server
        sys.argv = ["bench_serving", *job.arguments]
        if job.workload is None or job.requests is None:
            serving.cli_main()
        else:
            _run(serving, Path(job.workload), Path(job.requests))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(serving: Any, workload: Path, requests: Path) -> None:
    from sglang.benchmark.datasets import DatasetRow

    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    rows = [
        DatasetRow(request.prompt, request.input_tokens, request.output_tokens, extra_request_body=_body(request))
        for request in requests_of(workload)
    ]
    serving.get_dataset = lambda *_: rows
    serving.get_tokenizer = lambda *_: _NoTokenizer()
    serving.check_chat_template = lambda *_: True
    serving.time = _Clock
    serving.asyncio = _Loop()
    kept: list[RequestLog] = []
    samples: list[tuple[float, float, float]] = []
    zero, epoch = time.perf_counter(), time.time()
    original_benchmark, original_metrics = serving.benchmark, serving.calculate_metrics

    async def benchmark(**options: Any) -> Any:
        watch = asyncio.create_task(_watch(samples))
        try:
            return await original_benchmark(**options)
        finally:
            watch.cancel()

    def calculate_metrics(**options: Any) -> Any:
        kept.append(RequestLog.of_outputs(options["outputs"], zero, epoch, samples))
        return original_metrics(**options)

    serving.benchmark, serving.calculate_metrics = benchmark, calculate_metrics
    serving.cli_main()
    kept[0].save(requests)


def _body(request: Any) -> dict[str, Any]:
    """A token that is special to the tokenizer must not look like no token."""
    sampling = {"temperature": 0.0, "max_new_tokens": request.output_tokens, "ignore_eos": True}
    if request.stream_interval:
        sampling["stream_interval"] = request.stream_interval
    return {"sampling_params": {**sampling, "skip_special_tokens": False}}


async def _watch(samples: list[tuple[float, float, float]]) -> None:
    while True:
        due = time.perf_counter() + SAMPLE_S
        await asyncio.sleep(SAMPLE_S)
        now = time.perf_counter()
        samples.append((now, time.process_time(), max(0.0, now - due)))


if __name__ == "__main__":
    main()
