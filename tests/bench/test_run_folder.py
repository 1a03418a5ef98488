from dataclasses import replace
from pathlib import Path

import pytest

from bench.harness.run_folder import RunFolder, RunPlan, open_run
from bench.harness.schedule import CellKey
from sglang_eplb_affinity.domain.errors import InputError
from tests.bench.conftest import make_record

MACHINE = "test machine"


def begin(results: Path, name: str | None, plan: RunPlan) -> RunFolder:
    folder, continued = open_run(results, name, plan, MACHINE)
    assert not continued
    folder.write_json("run.json", plan.to_json())
    folder.write_json("environment.json", {"hardware": MACHINE})
    return folder


def test_plan_survives_its_file(tmp_path: Path, plan: RunPlan) -> None:
    assert begin(tmp_path, "one", plan).plan() == plan


def test_an_unfinished_run_is_continued_without_being_named(tmp_path: Path, plan: RunPlan) -> None:
    folder = begin(tmp_path, None, plan)
    folder.store.append(make_record(CellKey(0, "none", 1)))
    assert open_run(tmp_path, None, plan, MACHINE) == (folder, True)


def test_a_finished_run_is_not_continued_but_a_new_one_begun(tmp_path: Path, plan: RunPlan) -> None:
    folder = begin(tmp_path, "run-20200101-000000", plan)
    for cell in plan.cells():
        folder.store.append(make_record(cell))
    other, continued = open_run(tmp_path, None, plan, MACHINE)
    assert other != folder and not continued


@pytest.mark.parametrize("change", ["seed", "prompts", "hardware"])
def test_runs_that_cannot_be_compared_are_kept_apart(tmp_path: Path, plan: RunPlan, change: str) -> None:
    begin(tmp_path, "one", plan)
    machine = "another machine" if change == "hardware" else MACHINE
    if change == "seed":
        plan = replace(plan, profile=replace(plan.profile, seed=99))
    elif change == "prompts":
        plan = replace(plan, prompts_sha256="2" * 64)
    with pytest.raises(InputError, match="choose another name"):
        open_run(tmp_path, "one", plan, machine)


def test_with_gpus_only_these_must_be_the_same(tmp_path: Path, plan: RunPlan) -> None:
    cuda = replace(plan, profile=replace(plan.profile, server=replace(plan.profile.server, engine="cuda")))
    folder = begin(tmp_path, "one", cuda)
    folder.write_json("environment.json", {"hardware": "2 x NVIDIA H200, 32 cores of A"})
    assert open_run(tmp_path, "one", cuda, "2 x NVIDIA H200, 16 cores of B")[1]
    assert open_run(tmp_path, "one", cuda, "2 x NVIDIA H200 (of 4 in the host), 32 cores of A")[1]
    with pytest.raises(InputError, match="other hardware"):
        open_run(tmp_path, "one", cuda, "4 x NVIDIA H200, 32 cores of A")


def side_by_side(plan: RunPlan) -> RunPlan:
    return replace(plan, profile=replace(plan.profile, arms_side_by_side=True))


def test_rows_side_by_side_are_compared_within_one_sitting(tmp_path: Path, plan: RunPlan) -> None:
    plan = side_by_side(plan)
    folder = begin(tmp_path, "one", plan)
    row, sittings = plan.cells()[:3], ("first", "first", "second")
    assert {cell.concurrency for cell in row} == {1}
    for cell, sitting in zip(row, sittings, strict=True):
        record = make_record(cell)
        folder.store.append(replace(record, provenance=record.provenance | {"sitting": sitting}))
    assert folder.left(plan)[0].cells == tuple(plan.cells())
    folder.store.append(replace(record, provenance=record.provenance | {"sitting": "first"}))
    assert folder.left(plan)[0].cells == tuple(plan.cells()[3:])


def test_more_blocks_may_be_added_to_a_named_run(tmp_path: Path, plan: RunPlan) -> None:
    folder = begin(tmp_path, "one", plan)
    assert open_run(tmp_path, "one", replace(plan, blocks=3), MACHINE) == (folder, True)


@pytest.mark.parametrize("name", ["../outside", "", "a b", ".hidden"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, plan: RunPlan, name: str) -> None:
    with pytest.raises(InputError, match="--run"):
        open_run(tmp_path, name, plan, MACHINE)


def test_a_folder_without_a_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no run\.json"):
        RunFolder(tmp_path).plan()
