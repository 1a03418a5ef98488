from dataclasses import replace

import pandas as pd
import pytest

from bench.report import build_report, load_run
from bench.run_folder import RunFolder
from bench.schedule import CellKey
from bench.table import CPU_NOTE, over_blocks, tidy, write_tables
from tests.bench.conftest import make_record


def test_csv_and_parquet_hold_the_same_table(run_folder: RunFolder) -> None:
    frame = write_tables(run_folder, run_folder.plan())
    parquet = pd.read_parquet(run_folder.path / "cells.parquet")
    csv = pd.read_csv(run_folder.path / "cells.csv")
    assert len(frame) == len(parquet) == len(csv) == 5
    assert list(parquet["p50_ttft_ms"].dropna()) == pytest.approx(list(csv["p50_ttft_ms"].dropna()))
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
    assert "| 1 | affinity EPLB | 2 | 1 | 0.700 -> 0.940 | 1.900 -> 0.940 |  |" in lines
    assert "| 1 | no EPLB | 0 | 0 |  |  |  |" in lines


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
