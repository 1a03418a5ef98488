"""What a run measures, keeps and measures again; server and load generator are stand-ins here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import runner as runner_module
from bench.engine import Engine
from bench.load import LoadResult
from bench.probe import ProbeFailed
from bench.rebalance_log import LogSummary, Rebalance
from bench.run_folder import RunFolder, RunPlan
from bench.runner import Progress, Runner
from bench.schedule import CellKey
from bench.server import ServerFailed
from bench.sharegpt import Turn

MOVED = Rebalance("applied", moved_experts=3, gpu_fanout_before=1.9, gpu_fanout_after=1.5)
Event = tuple[str, str]


class Bench:
    """Stands in for servers and load; notes what happened in order. ``trouble`` may raise for a cell or a session."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.trouble: Callable[[str], None] = lambda name: None
        self.arm = ""

    def server(self, command: list[str], engine: Engine, log: Path, port: int, timeout: float) -> FakeServer:
        return FakeServer(self, log.stem)

    def load(self, command: list[str], engine: Engine, folder: Path, *rest: Any) -> LoadResult:
        self.trouble(folder.name)
        self.events.append(("cell", folder.name))
        level, sent = (int(command[command.index(flag) + 1]) for flag in ("--max-concurrency", "--num-prompts"))
        bench = {"completed": sent, "total_output_tokens": sent * 32, "concurrency": level, "request_throughput": 1.0}
        bench |= {"median_ttft_ms": 1.0, "p90_tpot_ms": 1.0, "p95_itl_ms": 1.0}
        return LoadResult(bench, {"itls": [[0.5, 0.25]]})


class FakeServer:
    port = 1
    alive = True

    def __init__(self, bench: Bench, session: str) -> None:
        self.bench, self.session = bench, session

    def __enter__(self) -> FakeServer:
        self.bench.trouble(self.session)
        self.bench.events.append(("start", self.session))
        return self

    def __exit__(self, *_: object) -> None:
        self.bench.events.append(("stop", self.session))

    def log_size(self) -> int:
        return 0

    def summary(self, start: int | None = None) -> LogSummary:
        return LogSummary(() if "none" in self.session else (MOVED, MOVED), 0)


class Characters:
    def encode(self, text: str, /) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int], /) -> str:
        return "".join(map(chr, ids))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    bench = Bench()
    monkeypatch.setattr(runner_module, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(runner_module, "Server", bench.server)
    monkeypatch.setattr(runner_module, "run_load", bench.load)
    monkeypatch.setattr(runner_module, "prepare_engine", lambda config: Engine("model", {}))
    monkeypatch.setattr(runner_module, "load_tokenizer", lambda model: Characters())
    monkeypatch.setattr(runner_module, "warm_up", lambda *_: 2)
    monkeypatch.setattr(runner_module, "probe_placement", lambda *_: {"gpu_fanout": 1.8})
    return bench


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    path = tmp_path / "run"
    path.mkdir()
    return RunFolder(path)


def measure(folder: RunFolder, plan: RunPlan) -> None:
    turns = [Turn("x" * 20 + str(n), "answer") for n in range(500)]
    Runner(folder, plan, turns, Progress()).run()


def cells(bench: Bench) -> list[str]:
    return [name for event, name in bench.events if event == "cell"]


def test_every_cell_is_measured_with_one_server_start_an_arm(bench: Bench, folder: RunFolder, plan: RunPlan) -> None:
    measure(folder, plan)
    assert sorted(cells(bench)) == sorted(c.name for c in plan.cells())
    assert [e for e, _ in bench.events] == ["start", "cell", "cell", "stop"] * 3
    assert folder.store.complete() == set(plan.cells())


def test_the_same_requests_go_to_every_arm_of_a_block(bench: Bench, folder: RunFolder, plan: RunPlan) -> None:
    plan = replace(plan, blocks=2)
    measure(folder, plan)
    digests: dict[tuple[int, int], set[str]] = {}
    for record in folder.store.records():
        digests.setdefault((record.key.block, record.key.concurrency), set()).add(record.workload_sha256)
    assert all(len(same) == 1 for same in digests.values())
    assert len(set.union(*digests.values())) == 4


def test_an_interrupted_run_goes_on_with_the_cell_it_was_in(bench: Bench, folder: RunFolder, plan: RunPlan) -> None:
    stop_at = plan.cells()[3].name

    def interrupt(name: str) -> None:
        if name == stop_at:
            raise KeyboardInterrupt

    bench.trouble = interrupt
    with pytest.raises(KeyboardInterrupt):
        measure(folder, plan)
    assert bench.events[-1][0] == "stop"
    before, bench.events, bench.trouble = cells(bench), [], lambda name: None
    measure(folder, plan)
    assert cells(bench)[0] == stop_at
    assert sorted(before + cells(bench)) == sorted(c.name for c in plan.cells())


def test_a_finished_run_starts_no_server(bench: Bench, folder: RunFolder, plan: RunPlan) -> None:
    measure(folder, plan)
    bench.events.clear()
    measure(folder, plan)
    assert bench.events == []


def test_a_server_that_does_not_start_voids_its_rows_and_no_others(
    bench: Bench, folder: RunFolder, plan: RunPlan
) -> None:
    def fail(name: str) -> None:
        if name == "b0-vanilla":
            raise ServerFailed("no memory")

    bench.trouble = fail
    measure(folder, plan)
    void = {key for key, record in folder.store.latest().items() if record.void}
    assert void == {CellKey(0, "vanilla", 1), CellKey(0, "vanilla", 4)}
    assert all(folder.store.latest()[key].void == ("no memory",) for key in void)
    bench.events, bench.trouble = [], lambda name: None
    measure(folder, plan)
    assert cells(bench) == ["b0-vanilla-c1", "b0-vanilla-c4"]
    assert folder.store.complete() == set(plan.cells())


def test_a_server_without_eplb_is_probed_and_a_failed_probe_costs_only_the_figure(
    bench: Bench, folder: RunFolder, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(folder, plan)
    latest = folder.store.latest()
    assert latest[CellKey(0, "none", 1)].placement["gpu_fanout_initial"] == 1.8
    assert latest[CellKey(0, "affinity", 1)].placement["gpu_fanout_initial"] == 1.9

    def fail(*_: object) -> None:
        raise ProbeFailed("no dump")

    monkeypatch.setattr(runner_module, "probe_placement", fail)
    measure(folder, replace(plan, blocks=2))
    record = folder.store.latest()[CellKey(1, "none", 1)]
    assert record.void == () and record.placement["gpu_fanout_initial"] is None


def test_records_say_where_they_come_from(bench: Bench, folder: RunFolder, plan: RunPlan) -> None:
    measure(folder, plan)
    record = folder.store.latest()[CellKey(0, "affinity", 4)]
    assert {"hardware", "versions", "commit", "server_flags"} <= set(record.provenance)
    assert "affinity" in record.provenance["server_flags"] and record.metrics["max_itl_ms"] == 500.0
