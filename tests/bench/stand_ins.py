"""Servers and a load generator of the benchmark that note what they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.engine import Engine
from bench.harness.load import LoadResult
from bench.harness.workload import Workload, requests_of
from tests.bench.loads import closed_loop

MOVED = (
    '[2026-11-21 20:05:09.5 TP0] [eplb-affinity] rebalance {"result": "applied", "moved_experts": 3, '
    '"gpu_fanout_before": 1.9, "gpu_fanout_after": 1.5}\n'
)
Event = tuple[str, str]


class Bench:
    """Stands in for servers and load; notes what happened in order. ``trouble`` may raise for a cell or a server."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.trouble: Callable[[str], None] = lambda name: None
        self.servers: list[FakeServer] = []

    def server(self, command: list[str], engine: Engine, log: Path, port: int, *_: Any) -> FakeServer:
        self.servers.append(FakeServer(self, command, log.stem, port))
        return self.servers[-1]


class FakeServer:
    def __init__(self, bench: Bench, command: list[str], name: str, port: int) -> None:
        self.bench, self.command, self.name, self.port = bench, command, name, port
        self.alive = self.paused = False

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def __enter__(self) -> FakeServer:
        self.bench.trouble(self.name)
        self.bench.events.append(("start", self.name))
        self.alive = True
        return self

    def stop(self) -> None:
        if self.alive:
            self.bench.events.append(("stop", self.name))
        self.alive = False

    def log_size(self) -> int:
        return 0

    def log_text(self, start: int | None = None) -> str:
        return "" if "none" in self.name else MOVED


class FakeClient:
    """A load generator that is busy for as long as the requests say, in no time."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self) -> None: ...

    def run(self, arguments: list[str], work: Workload, folder: Path, server: FakeServer, *rest: Any) -> LoadResult:
        self.bench.trouble(folder.name)
        self.bench.events.append(("cell", folder.name))
        assert arguments[arguments.index("--port") + 1] == str(server.port)
        assert [other.name for other in self.bench.servers if other.alive and not other.paused] == [server.name]
        level = int(arguments[arguments.index("--max-concurrency") + 1])
        return LoadResult({}, closed_loop(level, [r.output_tokens for r in requests_of(work.path)]))


class Characters:
    def encode(self, text: str, /) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int], /) -> str:
        return "".join(map(chr, ids))
