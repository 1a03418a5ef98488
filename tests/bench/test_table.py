from dataclasses import replace

import jupytext
import numpy as np
import pytest
from matplotlib.text import Text

from bench.figures.placements import placement_views, view
from bench.figures.server_log import unix_time
from bench.figures.steady import timeline
from bench.harness.engine import ROOT
from bench.harness.probe import save_window
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.schedule import CellKey
from bench.publish.report import NOTEBOOK, build_report, caveats, load_run, plot_figures, write_plots
from bench.publish.routing_plots import inside
from bench.publish.table import CPU_NOTE, over_blocks, read_table, tidy, write_tables
from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import eplb_placement
from tests.bench.conftest import make_record
from tests.bench.loads import closed_loop


def test_the_csv_file_holds_the_table(run_folder: RunFolder) -> None:
    frame = write_tables(run_folder, run_folder.plan())
    csv = read_table(run_folder.path)
    assert len(frame) == len(csv) == 5 and not any(csv["load"])
    assert list(csv["void"]) == list(frame["void"]) and list(csv["valid"]) == list(frame["valid"])
    assert list(csv["p50_ttft_ms"].dropna()) == pytest.approx(list(frame["p50_ttft_ms"].dropna()))
    assert list(frame["arm"]) == ["none", "vanilla", "affinity", "none", "affinity"]


def test_void_and_missing_rows_say_why_and_show_no_figures(run_folder: RunFolder) -> None:
    write_tables(run_folder, run_folder.plan())
    lines = (run_folder.path / "table.md").read_text().splitlines()
    assert "| 4 | affinity EPLB | VOID | VOID | VOID | VOID | VOID |" in lines
    assert any("affinity EPLB: 7 of 8 requests completed" in line for line in lines)
    assert any("b0-vanilla-c4: not measured" in line for line in lines)


def test_figures_and_placement_are_shown(run_folder: RunFolder) -> None:
    write_tables(run_folder, run_folder.plan())
    lines = (run_folder.path / "table.md").read_text().splitlines()
    assert "| 1 | affinity EPLB | 90.00 | 18.00 | 27.00 | 2.22 | 0.05 |" in lines
    assert "| 1 | affinity EPLB | 2 | 1 | 0.700 -> 0.940 | 1.900 -> 0.940 |  |  |  |" in lines
    assert "| 1 | no EPLB | 0 | 0 |  |  |  |  |  |" in lines


def test_what_the_steady_part_is_follows_from_the_load(run_folder: RunFolder) -> None:
    plan = run_folder.plan()
    write_tables(run_folder, plan)
    assert "from when the wanted number of requests is in flight" in (run_folder.path / "table.md").read_text()
    load = replace(plan.profile.load, request_rate=5.0)
    write_tables(run_folder, replace(plan, profile=replace(plan.profile, load=load)))
    text = (run_folder.path / "table.md").read_text()
    assert "from when the first request is done" in text and "wanted number" not in text


def test_a_cpu_run_says_that_its_speeds_mean_nothing_for_a_gpu(run_folder: RunFolder) -> None:
    write_tables(run_folder, run_folder.plan())
    assert CPU_NOTE in (run_folder.path / "table.md").read_text()


def test_rows_measured_on_a_crowded_machine_forbid_comparison(run_folder: RunFolder) -> None:
    plan = run_folder.plan()
    write_tables(run_folder, plan)
    assert "must not be compared" not in (run_folder.path / "table.md").read_text()
    record = make_record(CellKey(0, "vanilla", 4), served=0.9)
    run_folder.store.append(replace(record, metrics=record.metrics | {"other_cores": 1.4}))
    write_tables(run_folder, plan)
    text = (run_folder.path / "table.md").read_text()
    assert "used up to 1.4 of this machine's cores during 1 of 5 rows" in text
    assert "must not be compared" in load_run(run_folder.path).note


def test_one_block_is_said_to_show_no_difference(run_folder: RunFolder) -> None:
    plan = run_folder.plan()
    write_tables(run_folder, plan)
    assert "cannot be told from noise" in (run_folder.path / "table.md").read_text()
    write_tables(run_folder, replace(plan, blocks=2))
    assert "Median of 2 blocks." in (run_folder.path / "table.md").read_text()


def test_median_over_blocks_takes_rows_that_count_only() -> None:
    records = [make_record(CellKey(block, "none", 1), scale=scale) for block, scale in enumerate((1.0, 1.2, 5.0))]
    records.append(make_record(CellKey(3, "none", 1), void=("why",)))
    (row,) = over_blocks(tidy(records)).to_dict("records")
    assert row["p50_ttft_ms"] == pytest.approx(120.0)


def test_report_has_plots_and_an_executed_notebook_without_folders_of_this_machine(run_folder: RunFolder) -> None:
    build_report(run_folder, run_folder.plan())
    for name in ("latency", "placement", "rebalances", "ratio_to_vanilla"):
        assert (run_folder.path / "plots" / f"{name}.png").stat().st_size > 5_000
    html = (run_folder.path / "report.html").read_text()
    assert html.count("data:image/png;base64") >= 4
    assert "Traceback" not in html and str(run_folder.path) not in html


def test_a_run_without_any_cell_still_has_tables(run_folder: RunFolder) -> None:
    run_folder.store.path.unlink()
    build_report(run_folder, run_folder.plan())
    assert "not measured" in (run_folder.path / "table.md").read_text()
    assert not (run_folder.path / "report.html").exists()


def test_rebalances_of_void_cells_are_left_out(run_folder: RunFolder) -> None:
    write_tables(run_folder, run_folder.plan())
    assert set(load_run(run_folder.path).rebalances["concurrency"]) == {1}


def gpu_run(
    folder: RunFolder, link: str = "", arms: tuple[str, ...] = ("vanilla", "affinity", "vanilla-again")
) -> RunPlan:
    """Three blocks of some arms at concurrency 64 and 2048, on a made-up GPU host."""
    plan = folder.plan()
    server = replace(plan.profile.server, engine="cuda", nodes=2 if link else 1)
    profile = replace(plan.profile, server=server, link=link)
    plan = replace(plan, profile=profile, arms=arms, blocks=3, concurrency=(64, 2048))
    folder.store.path.unlink()
    for cell in plan.cells():
        gain = {"affinity": 0.9, "vanilla-again": 1.01}.get(cell.arm, 1.0)
        record = make_record(cell, scale=gain * (1 + 0.01 * cell.block * (cell.arm == "affinity")), served=0.9)
        more = {"p99_itl_ms": 55.5, "goodput_qps": 1.5, "client_cores": 0.41}
        folder.store.append(replace(record, metrics=record.metrics | more))
    folder.write_json("run.json", plan.to_json())
    return plan


def test_published_figures_are_beside_ours_and_marked(run_folder: RunFolder) -> None:
    write_tables(run_folder, gpu_run(run_folder))
    text = (run_folder.path / "table.md").read_text()
    assert "| 2048 | ours | -/100.00/90.90 |" in text
    assert "| 2048 | theirs | 1470.45/1463.95/1480.91 | 85.15/84.60/81.39 | 102.87/100.21/97.08 |" in text
    assert "| 128 | theirs | 539.93/537.22/541.04 | 49.18/49.10/49.10 | - | 2.36/2.36/2.36 |" in text
    assert "theirs: published with antgroup/sglang pull request 2, on other hardware and another model" in text


def test_ratios_have_intervals_and_the_noise_floor_beside_them(run_folder: RunFolder) -> None:
    write_tables(run_folder, gpu_run(run_folder))
    text = (run_folder.path / "table.md").read_text()
    assert "| 64 | affinity EPLB | vanilla EPLB | **0.909 [0.887, 0.932]** |" in text
    assert "differed by up to 1.00 % (95th percentile over 24 single ratios)" in text
    assert "| 64 | affinity EPLB | 55.50 | 1.50 |" in text and "| 64 | affinity EPLB | 0.41 |" in text


def test_a_variant_of_affinity_is_compared_with_it_and_without_vanilla_no_ratio_to_it_is_drawn(
    run_folder: RunFolder,
) -> None:
    write_tables(run_folder, gpu_run(run_folder, arms=("vanilla", "affinity", "cover")))
    write_plots(run_folder)
    text = (run_folder.path / "table.md").read_text()
    assert "| 64 | affinity EPLB, cover | affinity EPLB | **1.100 [" in text
    assert "| vanilla EPLB | affinity EPLB |" not in text
    drawn = run_folder.path / "plots" / "ratio_to_vanilla.png"
    assert drawn.exists()
    build_report(run_folder, gpu_run(run_folder, arms=("affinity", "cover")))
    assert "Traceback" not in (run_folder.path / "report.html").read_text() and not drawn.exists()


def test_an_emulated_link_is_named_in_every_table_and_plot(run_folder: RunFolder) -> None:
    write_tables(run_folder, gpu_run(run_folder, "emulated50"))
    text = (run_folder.path / "table.md").read_text()
    assert "**Emulated: after every dispatch and combine each GPU waits" in text
    for title in ("## In the layout", "## Ratios", "## Tails", "## Latency", "## Placement", "## Conditions"):
        (line,) = [line for line in text.splitlines() if line.startswith(title)]
        assert "(emulated link, 50 GB/s a GPU between nodes)" in line
    run = load_run(run_folder.path)
    assert "50 GB/s" in run.note and set(run.cells["kind"]) == {"measured"}  # as the records say
    for figure in plot_figures(run).values():
        assert "emulated link" in " ".join(text.get_text().replace("\n", " ") for text in figure.findobj(Text))


def test_the_notebook_opens_with_the_first_screen_and_says_what_stands_against_it(run_folder: RunFolder) -> None:
    cpu = caveats(replace(run_folder.plan(), blocks=1))
    write_tables(run_folder, gpu_run(run_folder, "emulated50"))
    run = load_run(run_folder.path)
    assert run.opening.startswith("Every server got the same requests") and "## " not in run.opening
    assert any("50 GB/s" in caveat for caveat in run.caveats) and not run.on_cpu
    assert CPU_NOTE in cpu and any("a difference cannot be told from noise" in caveat for caveat in cpu)
    cells = [cell.source for cell in jupytext.read(NOTEBOOK).cells]
    shown = [
        "run.opening",
        "ratio_plot",
        "run.caveats",
        "latency_plot",
        "run.markdown",
    ]  # question, table, plot, caveat
    at = [next(i for i, cell in enumerate(cells) if part in cell) for part in shown]
    assert at == sorted(at) and "Does placing experts by affinity help?" in cells[0]


@pytest.mark.parametrize("rule", ["static", "dynamic", "cover"])
def test_plots_of_placements_judge_as_the_server_does(rule: DispatchRule) -> None:
    trace = RoutingTrace.load(ROOT / "bench" / "data" / "tiny_moe_test.npz").select(np.arange(0, 48384, 100))
    window, topology = RoutingWindow.from_trace(trace), Topology(4)
    assert window.tokens is not None
    expert_map = eplb_placement(window.counts, topology, 72)
    shown = view("vanilla", expert_map, window.tokens, topology, rule)
    figures = MapFigures.of(window, expert_map, topology, rule)
    assert figures is not None and shown.mean_fanout == pytest.approx(figures.gpu_fanout)
    assert (1 / shown.gpu_load.max(1)).mean() == pytest.approx(figures.balancedness)


def test_routing_and_timelines_are_drawn(run_folder: RunFolder) -> None:
    plan = gpu_run(run_folder)
    trace = RoutingTrace.load(ROOT / "bench" / "data" / "tiny_moe_test.npz").select(np.arange(0, 48384, 100))
    window = RoutingWindow.from_trace(trace)
    save_window(window, run_folder.path / "routing.npz")
    cell = CellKey(0, "vanilla", 2048)
    (run_folder.path / "cells" / cell.name).mkdir(parents=True)
    with (run_folder.path / "cells" / cell.name / "timeline.npz").open("wb") as file:
        np.savez(file, epoch=unix_time("2026-11-21 20:05:55"), **timeline(closed_loop(4, [32] * 20)))  # type: ignore[arg-type]
    write_tables(run_folder, plan)
    run = load_run(run_folder.path)
    none, vanilla, affinity = run.views
    assert affinity.mean_fanout < none.mean_fanout and affinity.fanout.sum() == none.fanout.sum() == 242 * 6
    assert vanilla.gpu_load.max(1).mean() < none.gpu_load.max(1).mean()
    assert inside(affinity.coactivation[0], 18) > inside(none.coactivation[0], 16)
    (cover,) = placement_views(window, plan.profile.server, ["none", "cover"])[3:]  # only if the run has it
    assert cover.arm == "cover" and cover.mean_fanout < affinity.mean_fanout
    (shown,) = run.timelines
    assert [round(at, 3) for at, _ in shown.rebalances] == [4.0, 9.0] and shown.arm == "vanilla"
    assert {"coactivation", "gpu_load", "fanout", "rebalances_over_itl"} <= set(plot_figures(run))
