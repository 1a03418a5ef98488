"""Decode passes are timed by what a server streams, and their operations counted in the profile that it writes."""

from __future__ import annotations

import gzip
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
OPERATIONS = 40


class _Handler(BaseHTTPRequestHandler):
    """Streams a batch's tokens as SGLang does, sixteen at a time, and writes a profile once one was asked for."""

    chunks = CHUNKS
    folder: Path | None = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        if self.path == "/start_profile":
            _Handler.folder = Path(body["output_dir"])
        if self.path != "/generate":
            return
        for number in self.chunks:
            time.sleep(PASS_SECONDS * (16 if number > 1 else 120))  # prefill takes longer
            for index in range(2):
                event = {"index": index, "meta_info": {"completion_tokens": number}}
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")
        if _Handler.folder is not None:
            _Handler.folder.mkdir(exist_ok=True)
            events = [{"cat": "cpu_op", "name": "aten::add"}] * OPERATIONS + [
                {"cat": "user_annotation", "name": "step"}
            ]
            for stage in ("EXTEND", "DECODE"):
                of_stage = events if stage == "DECODE" else events * 2
                path = _Handler.folder / f"1-TP-0-{stage}.trace.json.gz"
                path.write_bytes(gzip.compress(json.dumps({"traceEvents": of_stage}).encode()))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setattr(_Handler, "folder", None)
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    monkeypatch.setattr(recording_costs, "cpu_seconds", lambda _: time.perf_counter())
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}", log=tmp_path / "absent.log")
    http.shutdown()
    http.server_close()


def test_a_decode_pass_is_timed_after_prefill(server: Any) -> None:
    seconds, cpu = recording_costs.decode(server, 0)
    assert PASS_SECONDS <= seconds < 2.5 * PASS_SECONDS and cpu == pytest.approx(seconds, rel=0.2)


def test_too_few_streamed_tokens_give_no_time(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Handler, "chunks", CHUNKS[:2])
    with pytest.raises(ServerFailed, match="streamed tokens 1 to 17 of 96"):
        recording_costs.decode(server, 0)


def test_operations_of_decode_passes_are_counted(server: Any, tmp_path: Path) -> None:
    assert recording_costs.operations(server, tmp_path / "profiles") == OPERATIONS / recording_costs.PROFILED_PASSES


def test_ratios_are_taken_block_by_block() -> None:
    times = (1.0, 3.0, 2.0)
    rows = [{"without the recorder": time, "stopped": time, "on": 1.1 * time} for time in times]
    rows = [row | {name + recording_costs.CPU: value / 2 for name, value in row.items()} for row in rows]
    counts = {"without the recorder": 100.0, "stopped": 100.0, "on": 130.0}
    found = recording_costs.result_of(rows, counts, 3)
    assert found["ratios"]["on / stopped"] == {"ratio": 1.1, "lower": 1.1, "upper": 1.1, "blocks": 3}
    assert found["ratios"]["without the recorder / stopped, CPU time"]["ratio"] == 1 and found["median_ms"]["on"] == 2.2
    figures = {figure.name: figure.value for figure in parse_figures(found, "result")}
    assert figures == {
        "recording.cpu.decode_pass_ratio": 1.1, "recording.cpu.decode_cpu_time_ratio": 1.1,
        "recording.cpu.operations_added": 30.0,
    }  # fmt: skip


def test_cpu_time_is_that_of_the_process_that_runs_the_passes(tmp_path: Path) -> None:
    command = "import time, sys; time.sleep(60)"
    process = subprocess.Popen(["sglang::scheduler", "-c", command], executable=sys.executable, start_new_session=True)
    try:
        while (seconds := recording_costs.cpu_seconds(SimpleNamespace(process=process))) <= 0:  # type: ignore[arg-type]
            time.sleep(0.01)
        assert seconds < 30
    finally:
        process.kill()
        process.wait()
