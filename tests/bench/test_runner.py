"""What a run measures, keeps and measures again; server and load generator are stand-ins here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.harness import runner as runner_module
from bench.harness import sitting as sitting_module
from bench.harness.engine import Engine
from bench.harness.probe import ProbeFailed
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.runner import Progress, Runner
from bench.harness.schedule import CellKey
from bench.harness.server import ServerFailed
from bench.harness.sharegpt import Turn
from tests.bench.stand_ins import Bench, Characters, FakeClient


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    bench = Bench()
    monkeypatch.setattr(runner_module, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(runner_module, "Server", bench.server)
    monkeypatch.setattr(runner_module, "LoadClient", lambda *_: FakeClient(bench))
    monkeypatch.setattr(runner_module, "prepare_engine", lambda config: Engine("model", {}))
    monkeypatch.setattr(sitting_module, "load_tokenizer", lambda model: Characters())
    monkeypatch.setattr(runner_module, "warm_up_server", lambda *_: 2)
    monkeypatch.setattr(runner_module, "probe_placement", lambda *_: {"gpu_fanout": 1.8})
    return bench


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    path = tmp_path / "run"
    path.mkdir()
    return RunFolder(path)


def measure(folder: RunFolder, plan: RunPlan, seconds: float | None = None) -> bool:
    turns = [Turn("x" * 20 + str(n), "answer") for n in range(500)]
    return Runner(folder, plan, turns, Progress(), seconds).run()


def cells(bench: Bench) -> list[str]:
    return [name for event, name in bench.events if event == "cell"]


def side_by_side(plan: RunPlan) -> RunPlan:
    return replace(plan, profile=replace(plan.profile, arms_side_by_side=True))


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
    assert {"hardware", "versions", "commit", "server_flags", "sitting", "link"} <= set(record.provenance)
    assert "affinity" in record.provenance["server_flags"] and record.metrics["max_itl_ms"] == pytest.approx(
        20.0, rel=0.01
    )
    assert record.provenance["kind"] == "measured" and record.provenance["link"] == "cpu"
    assert (folder.path / "cells" / "b0-affinity-c4" / "timeline.npz").is_file()


def test_records_name_no_folder_of_their_machine(bench: Bench, folder: RunFolder, plan: RunPlan) -> None:
    served = ("--init-expert-location", str(folder.path / "maps" / "affinity.json"))
    server = replace(plan.profile.server, eplb_flags=(*plan.profile.server.eplb_flags, *served))
    measure(folder, replace(plan, profile=replace(plan.profile, server=server)))
    flags = folder.store.latest()[CellKey(0, "affinity", 4)].provenance["server_flags"]
    assert flags[flags.index(served[0]) + 1] == f"results/{folder.name}/maps/affinity.json"
    assert str(folder.path.parent) not in " ".join(flags)


def test_arms_side_by_side_start_once_and_take_turns(bench: Bench, folder: RunFolder, plan: RunPlan) -> None:
    plan = side_by_side(replace(plan, blocks=2))
    assert measure(folder, plan)
    assert sorted(name for event, name in bench.events if event == "start") == ["affinity", "none", "vanilla"]
    assert cells(bench) == [cell.name for cell in plan.cells()]
    assert {event for event, _ in bench.events[-3:]} == {"stop"}
    assert folder.store.complete() == set(plan.cells())
    assert len({record.provenance["sitting"] for record in folder.store.records()}) == 1
    flags = [record.provenance["server_flags"] for record in folder.store.records()[:3]]
    assert len({f[f.index("--nccl-port") + 1] for f in flags}) == 3


def test_an_arm_that_does_not_start_beside_the_others_voids_its_own_rows(
    bench: Bench, folder: RunFolder, plan: RunPlan
) -> None:
    def fail(name: str) -> None:
        if name == "vanilla":
            raise ServerFailed("no memory")

    bench.trouble = fail
    measure(folder, side_by_side(plan))
    latest = folder.store.latest()
    assert {key.arm for key, record in latest.items() if record.void} == {"vanilla"}
    assert latest[CellKey(0, "vanilla", 1)].void == ("no memory",)
    bench.events, bench.trouble = [], lambda name: None
    measure(folder, side_by_side(plan))
    assert len(cells(bench)) == 6  # rows that are compared come from one sitting
    assert folder.store.complete() == set(plan.cells())


def test_a_run_stops_in_time_and_goes_on(
    bench: Bench, folder: RunFolder, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(sitting_module.time, "monotonic", lambda: clock[0])

    def tick(name: str) -> None:
        clock[0] += 10.0 if name.startswith("b") and "-c" in name else 0.0

    bench.trouble = tick
    plan = side_by_side(replace(plan, blocks=2))
    # Row 5 would be over after 50 s; the 4th is as long as the 1st of its concurrency.
    assert not measure(folder, plan, seconds=45.0)
    assert cells(bench) == [cell.name for cell in plan.cells()[: len(cells(bench))]] and len(cells(bench)) in (4, 5)
    bench.events, clock[0] = [], 0.0
    assert measure(folder, plan, seconds=1000.0)
    assert cells(bench)[0] == plan.cells()[3].name  # the rows of a concurrency that was not finished, again
    assert folder.store.complete() == set(plan.cells())
    bench.events.clear()
    assert measure(folder, plan, seconds=0.0) and not bench.events


def test_a_row_without_the_emulated_link_in_its_log_is_void(bench: Bench, folder: RunFolder, plan: RunPlan) -> None:
    server = replace(plan.profile.server, engine="cuda")
    plan = replace(plan, profile=replace(plan.profile, link="emulated50", server=server), arms=("vanilla",))
    measure(folder, plan)
    (reason,) = folder.store.latest()[CellKey(0, "vanilla", 1)].void
    assert reason == "the server's log does not show the emulated link (emulated link, 50 GB/s a GPU between nodes)"
    assert folder.store.latest()[CellKey(0, "vanilla", 1)].provenance["kind"] == "emulated"


def test_a_server_that_cannot_record_is_not_asked_to(
    bench: Bench, folder: RunFolder, plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("SGLang's schedulers end when a recorder that is off is asked")

    monkeypatch.setattr(runner_module, "probe_placement", fail)
    measure(folder, replace(plan, arms=("plain",), concurrency=(1,)))
    assert cells(bench) == ["b0-plain-c1"]
