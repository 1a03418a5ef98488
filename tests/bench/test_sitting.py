"""How a server is warmed up before its rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.figures.rebalance_log import parse_log
from bench.harness import sitting as sitting_module
from bench.harness.arms import ARMS
from bench.harness.engine import Engine
from bench.harness.load import LoadResult
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.sharegpt import Turn
from bench.harness.workload import Workload
from tests.bench.stand_ins import MOVED, Bench, Characters, FakeClient


def test_a_gpu_server_warms_up_at_every_concurrency_until_it_is_flat(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sitting_module, "load_tokenizer", lambda model: Characters())
    server = replace(plan.profile.server, engine="cuda")
    plan = replace(plan, profile=replace(plan.profile, server=server))
    turns = [Turn("x" * 20 + str(n), "answer") for n in range(500)]
    works = sitting_module.Preparation(plan, turns, "model", tmp_path).workloads(0)
    assert {key: work.requests for key, work in works.items() if key[1] < 0} == {("", -1): 1, ("", -4): 4}
    asked: list[tuple[str, str]] = []

    class Client(FakeClient):
        def run(self, arguments: list[str], work: Workload, *rest: Any) -> LoadResult:
            asked.append((arguments[arguments.index("--max-concurrency") + 1], work.path.name))
            return super().run(arguments, work, *rest)

    bench, folder = Bench(), RunFolder(tmp_path)
    running = bench.server([], Engine("model", {}), Path("vanilla.log"), 1).__enter__()
    running.summary = lambda: parse_log(MOVED)  # type: ignore[attr-defined]
    arm, budget = ARMS["vanilla"], sitting_module.Budget(None)
    rounds = sitting_module.warm_up_server(running, arm, works, plan, "model", Client(bench), budget, folder)  # type: ignore[arg-type]
    assert rounds == 2
    assert asked == [("1", "b0-c-1.json"), ("4", "b0-c-4.json"), ("4", "b0-c0.json"), ("4", "b0-c0.json")]

    class Silent(Client):
        def run(self, arguments: list[str], *rest: Any) -> LoadResult:
            asked.append((arguments[arguments.index("--max-concurrency") + 1], ""))
            return LoadResult({}, None, "no result after 60 s")

    asked.clear()
    with pytest.raises(OSError, match="warm-up wave of 1 requests: no result after 60 s"):
        sitting_module.warm_up_server(running, arm, works, plan, "model", Silent(bench), budget, folder)  # type: ignore[arg-type]
    assert asked == [("1", "")]


def test_what_waits_for_a_place_is_no_part_of_the_short_waves(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sitting_module, "load_tokenizer", lambda model: Characters())
    flags = (*plan.profile.server.flags, "--max-running-requests", "3")
    server, load = replace(plan.profile.server, engine="cuda", flags=flags), replace(plan.profile.load, requests={8: 9})
    plan = replace(plan, profile=replace(plan.profile, server=server, load=load), concurrency=(1, 4, 8))
    turns = [Turn("x" * 20 + str(n), "answer") for n in range(500)]
    works = sitting_module.Preparation(plan, turns, "model", tmp_path).workloads(0)
    assert {key[1]: work.requests for key, work in works.items() if key[1] < 0} == {-1: 1, -3: 3}
