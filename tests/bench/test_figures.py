from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.figures.headline import default_prefix, figures_of_run
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.schedule import CellKey
from bench.harness.store import CellRecord
from bench.publish.summary import load_figures
from sglang_eplb_affinity.domain.errors import InputError
from tests.bench.conftest import make_record


def gpu_plan(plan: RunPlan, *arms: str) -> RunPlan:
    server = replace(plan.profile.server, engine="cuda", ranks=2, nodes=1)
    return replace(plan, profile=replace(plan.profile, server=server), arms=arms, blocks=3)


def measured(key: CellKey, scale: float) -> CellRecord:
    return make_record(key, scale=scale, served=0.9)


def test_a_cpu_run_gives_placement_and_no_speeds(run_folder: RunFolder) -> None:
    plan = run_folder.plan()
    figures = {f.name: f for f in figures_of_run(run_folder, plan, "bench.cpu")}
    assert {name.removeprefix("bench.cpu.") for name in figures} == {
        f"{arm}.{figure}" for arm in ("vanilla", "affinity") for figure in ("balancedness", "gpu_fanout")
    }
    assert figures["bench.cpu.affinity.gpu_fanout"].value == 0.94
    assert figures["bench.cpu.affinity.gpu_fanout"].commit == "abcdef1"


def test_ratios_are_those_of_the_largest_concurrency_with_an_interval(run_folder: RunFolder, plan: RunPlan) -> None:
    plan = gpu_plan(plan, "vanilla", "affinity")
    for block, drift in enumerate((1.0, 1.5, 0.7)):
        for concurrency, gain in ((1, 0.5), (4, 0.9)):
            run_folder.store.append(measured(CellKey(block, "vanilla", concurrency), drift))
            run_folder.store.append(
                measured(CellKey(block, "affinity", concurrency), drift * gain * (1 + 0.01 * block))
            )
    figures = {f.name: f for f in figures_of_run(run_folder, plan, "bench.nvlink")}
    ratio = figures["bench.nvlink.p90_tpot_ratio_to_vanilla"]
    assert ratio.value == pytest.approx(0.909, abs=1e-3)
    assert 0.88 < ratio.lower < ratio.value < ratio.upper < 0.94
    assert figures["bench.nvlink.qps_ratio_to_vanilla"].value == pytest.approx(1 / 0.909, abs=1e-3)
    assert "bench.noise_floor_pct" not in figures


def test_cover_has_ratios_of_its_own(run_folder: RunFolder, plan: RunPlan) -> None:
    plan = gpu_plan(plan, "vanilla", "affinity", "cover")
    for arm, scale in (("vanilla", 1.0), ("affinity", 0.9), ("cover", 0.8)):
        run_folder.store.append(measured(CellKey(0, arm, 1), scale))
    figures = {f.name: f for f in figures_of_run(run_folder, plan, "bench.nvlink")}
    assert figures["bench.nvlink.p90_tpot_ratio_to_vanilla"].value == pytest.approx(0.9)
    assert figures["bench.nvlink.cover.p90_tpot_ratio_to_vanilla"].value == pytest.approx(0.8)


def test_figures_of_an_emulated_link_say_so_and_are_named_after_it(run_folder: RunFolder, plan: RunPlan) -> None:
    plan = gpu_plan(plan, "vanilla", "affinity")
    plan = replace(plan, profile=replace(plan.profile, link="emulated25"))
    for arm in plan.arms:
        run_folder.store.append(measured(CellKey(0, arm, 1), 1.0))
    assert default_prefix(plan) == "bench.emulated25"
    figures = {f.name: f for f in figures_of_run(run_folder, plan, default_prefix(plan))}
    assert figures["bench.emulated25.p50_ttft_ratio_to_vanilla"].kind == "emulated"
    assert default_prefix(gpu_plan(plan, "vanilla")) == "bench.emulated25"
    assert default_prefix(run_folder.plan()) == "bench.cpu"


def test_figures_of_four_gpus_are_named_apart_from_those_of_two(run_folder: RunFolder, plan: RunPlan) -> None:
    plan = gpu_plan(plan, "vanilla", "vanilla-again")
    plan = replace(plan, profile=replace(plan.profile, server=replace(plan.profile.server, ranks=4)))
    for block in range(3):
        run_folder.store.append(measured(CellKey(block, "vanilla", 1), 1.0))
        run_folder.store.append(measured(CellKey(block, "vanilla-again", 1), 1.02))
    names = {figure.name for figure in figures_of_run(run_folder, plan, default_prefix(plan))}
    assert "ep4.bench.noise_floor_pct" in names and not any(name.startswith("bench.") for name in names)


def test_an_a_a_arm_gives_the_noise_floor(run_folder: RunFolder, plan: RunPlan) -> None:
    plan = gpu_plan(plan, "vanilla", "vanilla-again")
    for block in range(3):
        run_folder.store.append(measured(CellKey(block, "vanilla", 1), 1.0))
        run_folder.store.append(measured(CellKey(block, "vanilla-again", 1), 1.02))
    figures = {f.name: f for f in figures_of_run(run_folder, plan, "bench.nvlink")}
    assert figures["bench.noise_floor_pct"].value == pytest.approx(2.0, abs=0.01)


def test_emulated_nodes_are_called_emulated(run_folder: RunFolder, plan: RunPlan) -> None:
    record = make_record(CellKey(0, "vanilla", 4), served=0.9)
    run_folder.store.append(replace(record, placement=record.placement | {"node_fanout_served": 1.5}))
    kinds = {f.name: f.kind for f in figures_of_run(run_folder, plan, "b.c")}
    assert kinds["b.c.vanilla.node_fanout"] == "emulated" and kinds["b.c.vanilla.gpu_fanout"] == "measured"


def test_figures_of_uncommitted_code_say_so(run_folder: RunFolder, plan: RunPlan) -> None:
    record = make_record(CellKey(0, "vanilla", 4), served=0.9)
    dirty = {**record.provenance, "uncommitted_changes": True}
    run_folder.store.append(replace(record, provenance=dirty, finished="2026-11-22T00:00:00Z"))
    assert figures_of_run(run_folder, plan, "b.c")[0].versions["uncommitted_changes"] == "yes"


def test_a_run_where_nothing_counts_gives_nothing(run_folder: RunFolder, plan: RunPlan) -> None:
    run_folder.store.path.unlink()
    run_folder.store.append(make_record(CellKey(0, "none", 1), void=("why",)))
    with pytest.raises(InputError, match="no row counts"):
        figures_of_run(run_folder, plan, "b.c")


def test_command_writes_entries_that_can_be_added(run_folder: RunFolder, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = ["summary", "from-run", str(run_folder.path), "--prefix", "bench.cpu", "--output", str(output)]
    assert CliRunner().invoke(main, command).exit_code == 0
    assert len(load_figures(output)) == 4
