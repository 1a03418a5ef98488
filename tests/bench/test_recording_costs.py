"""Decode passes are timed by what a server streams; the operations that recording adds are counted."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.harness.server import ServerFailed
from bench.micro import recording_costs
from bench.publish.summary import parse_figures

CHUNKS, PASS_SECONDS = (1, 17, 33, 49, 65), 0.005


class _Handler(BaseHTTPRequestHandler):
    """Streams a batch's tokens as SGLang does, sixteen at a time."""

    chunks = CHUNKS

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        if self.path != "/generate":
            return
        for number in self.chunks:
            for index in range(2):
                event = {"index": index, "meta_info": {"completion_tokens": number}}
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    # The clocks are read once for each of a request's chunks: prefill takes 120 passes' time, then each chunk 16.
    ends = [PASS_SECONDS * (120 + 16 * number) for number in range(len(CHUNKS))]
    clock, cpu_clock = iter(ends), iter([end / 2 for end in ends])
    monkeypatch.setattr(recording_costs, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(recording_costs, "cpu_seconds", lambda _: next(cpu_clock))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}", log=tmp_path / "absent.log")
    http.shutdown()
    http.server_close()


def test_a_decode_pass_is_timed_after_prefill(server: Any) -> None:
    seconds, cpu = recording_costs.decode(server, 0)
    assert (seconds, cpu) == pytest.approx((PASS_SECONDS, PASS_SECONDS / 2))


def test_too_few_streamed_tokens_give_no_time(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Handler, "chunks", CHUNKS[:2])
    with pytest.raises(ServerFailed, match="streamed tokens 1 to 17 of 96"):
        recording_costs.decode(server, 0)


def test_operations_of_recording_are_counted_by_layer() -> None:
    few, many = recording_costs.operations(1), recording_costs.operations(3)
    assert (many - few) % 2 == 0 and 10 < (many - few) // 2 < 60


def test_ratios_are_taken_block_by_block() -> None:
    times = (1.0, 3.0, 2.0)
    rows = [{"without the recorder": time, "stopped": time, "on": 1.1 * time} for time in times]
    rows = [row | {name + recording_costs.CPU: value / 2 for name, value in row.items()} for row in rows]
    found = recording_costs.result_of(rows, 3)
    assert found["ratios"]["on / stopped"] == {"ratio": 1.1, "lower": 1.1, "upper": 1.1, "blocks": 3}
    assert found["ratios"]["without the recorder / stopped, CPU time"]["ratio"] == 1 and found["median_ms"]["on"] == 2.2
    figures = {figure.name: figure.value for figure in parse_figures(found, "result")}
    assert figures == {
        "recording.cpu.decode_pass_ratio": 1.1, "recording.cpu.decode_cpu_time_ratio": 1.1,
        "recording.cpu.operations_added": recording_costs.operations(found["layers"]),
    }  # fmt: skip


def test_cpu_time_is_that_of_the_process_that_runs_the_passes(tmp_path: Path) -> None:
    command = "import time, sys; time.sleep(60)"
    process = subprocess.Popen(["sglang::scheduler", "-c", command], executable=sys.executable, start_new_session=True)
    try:
        # Popen returns while the kernel is still putting the new command line in place.
        while not Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.001)
        while (seconds := recording_costs.cpu_seconds(SimpleNamespace(process=process))) <= 0:  # type: ignore[arg-type]
            time.sleep(0.01)
        assert seconds < 30
    finally:
        process.kill()
        process.wait()
