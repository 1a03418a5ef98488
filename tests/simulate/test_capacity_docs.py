"""The capacity page shows the results that are committed beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.capacity import __main__ as commands
from bench.capacity import by_phase, decode, small_passes
from bench.capacity.docs import compact_table, fill, gains_table, table_named
from sglang_eplb_affinity.domain.errors import InputError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "simulate"


def result(**changes):
    interval = {"value": 10.0, "lower": 9.0, "upper": 11.0}
    entry = {
        "gpus": 8, "phase": "decode", "mode": "low_latency", "tokens_per_gpu": 64, "algorithm": "affinity",
        "redundant": 8, "dispatch_rule": "static", "step_ms": interval, "tokens_per_second_per_gpu": 6400.0,
        "gain_pct_over_eplb": interval, "gpu_fanout": 3.0, "node_fanout": 1.5, "load_max_over_mean": 1.1,
        "slowest": {"dispatch": "latency (100 % of layers)"},
        **{f"{stage}_us": interval for stage in ("dispatch", "experts", "combine", "rest")},
    }  # fmt: skip
    return {**entry, **changes}


def test_compact_table_has_one_row_a_result_and_no_gain_for_the_baseline():
    baseline = result(algorithm="eplb")
    del baseline["gain_pct_over_eplb"]
    lines = compact_table({"results": [result(), baseline]}).splitlines()
    assert len(lines) == 4
    assert "+10.0 % [+9.0, +11.0]" in lines[2] and "%]" not in lines[3].replace("% of layers", "")
    assert len({line.count("|") for line in lines}) == 1


def test_gains_have_a_row_for_each_size_and_a_column_for_each_phase(tmp_path):
    baseline = result(algorithm="eplb")
    del baseline["gain_pct_over_eplb"]
    prefill = result(phase="prefill", mode="normal", gpus=16)
    (tmp_path / "one.json").write_text(json.dumps({"system": "one", "results": [result(), baseline, prefill]}))
    (tmp_path / "day-one.json").write_text(json.dumps({"days": []}))
    assert gains_table(tmp_path).splitlines() == [
        "| cluster | GPUs | decode, low latency | prefill, normal |",
        "|---|---:|---|---|",
        "| [one](../results/simulate/one.md) | 8 | +10.0 % [+9.0, +11.0], +8 |  |",
        "| [one](../results/simulate/one.md) | 16 |  | +10.0 % [+9.0, +11.0], +8 |",
    ]


def test_primary_has_a_column_of_its_own_and_says_what_large_passes_follow(tmp_path):
    small, large = result(dispatch_rule="primary"), result(dispatch_rule="cover_balanced", gpus=32)
    results = [result(), small, result(gpus=32), large]
    (tmp_path / "one.json").write_text(json.dumps({"system": "one", "results": results}))
    cell = "+10.0 % [+9.0, +11.0]"
    assert gains_table(tmp_path).splitlines() == [
        "| cluster | GPUs | decode, low latency | decode, low latency, `primary` |",
        "|---|---:|---|---|",
        f"| [one](../results/simulate/one.md) | 8 | {cell}, +8 | {cell}, +8 |",
        f"| [one](../results/simulate/one.md) | 32 | {cell}, +8 | {cell} (as `cover_balanced`), +8 |",
    ]


def test_decode_arms_beside_eplb_and_its_best(system_file, trace, monkeypatch):
    monkeypatch.setattr(decode, "RUNS", ((str(system_file), 8, (8, 16), (0,)),))
    monkeypatch.setattr(decode, "RESAMPLES", 2)
    monkeypatch.setattr(decode, "BATCHES", (4, 128))  # a small pass and a large one
    every = decode.decode_rows(trace, trace)
    with_further = [row for row in every if "further" in row["arm"]]  # where a GPU has more slots than that, two here
    assert [(row["batch"], row["redundant"], row["served rule"]) for row in with_further] == [(4, 16, "primary")]
    rows = [row for row in every if row["redundant"] == 8]
    arms = ("contiguous map", "EPLB", "affinity, `static`", "affinity, `cover`", "affinity, `primary`")
    assert [(row["batch"], row["arm"]) for row in rows] == [(batch, arm) for batch in decode.BATCHES for arm in arms]
    served = [row["served rule"] for row in rows]
    assert served == [*["static"] * 3, "cover", "primary", *["static"] * 3, "cover", "static"]
    for first in (0, 5):
        _, eplb, static, *_ = rows[first : first + 5]
        assert eplb["gain over EPLB %"] == 0 and eplb["best EPLB ms"] <= eplb["step ms"]
        assert eplb["best EPLB redundant"] in (0, 8) and eplb["best EPLB active slots"] <= eplb["active slots"] <= 3
        assert static["gain over EPLB %"] == pytest.approx(100 * (1 - static["step ms"] / eplb["step ms"]), abs=0.5)
    assert len(decode.decode_table(every).splitlines()) == 6 and len(every) == 21
    lines = decode.decode_table(rows).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "`cover_balanced`" not in lines[2] and "(as `static`)" in lines[3]
    assert f"{rows[0]['step ms']:.1f}" in lines[2] and f"ms, {rows[0]['active slots']:.1f} |" in lines[2]


def test_sizes_of_passes_compare_the_two_rules_whatever_servers_do(system_file, trace, monkeypatch):
    monkeypatch.setattr(small_passes, "RUNS", ((str(system_file), 8, (8, 16)),))
    monkeypatch.setattr(small_passes, "RESAMPLES", 2)
    monkeypatch.setattr(small_passes, "ROWS", (8, 16, 64))
    found = small_passes.size_rows(trace, trace)
    of = [(row["redundant/GPU"], row["tokens/GPU"], row["rows"], row["small"]) for row in found]
    assert of == [
        (1, 4, 8, True), (1, 8, 16, False), (1, 32, 64, False), (2, 4, 8, True), (2, 8, 16, True), (2, 32, 64, False)
    ]  # fmt: skip
    assert all(row["ratio"] == pytest.approx(row["primary ms"] / row["static ms"]) for row in found)
    assert len({round(row["ratio"], 6) for row in found}) == 6  # large passes go by what was asked, too
    lines = small_passes.size_table(found).splitlines()
    assert len(lines) == 4 and lines[2].count("**") == 2 and lines[3].count("**") == 4
    assert lines[0].endswith("| 8 rows | 16 rows | 64 rows |") and "8 GPUs | 2 | 1 |" in lines[2]


def test_rules_by_phase_change_prefill_alone(system_file, trace, monkeypatch):
    monkeypatch.setattr(by_phase, "RUNS", ((str(system_file), 8, (8,)),))
    monkeypatch.setattr(by_phase, "BATCHES", 2)
    eplb, static, phases, planned = by_phase.phase_rows(trace, trace)
    assert [row["arm"] for row in (eplb, static, phases)] == ["EPLB", "`static` in both", "by phase"]
    assert phases["prefill 4096"] < static["prefill 4096"] != planned["prefill 4096"]
    for column in ("decode 32", "decode 128"):
        assert phases[column] == static[column]
    assert f"| {phases['prefill 4096']:.1f} |" in by_phase.phase_table([eplb, static, phases]).splitlines()[4]


@pytest.mark.parametrize("command", ["decode", "sizes", "phases", "v2"])
def test_a_folder_that_cannot_be_made_is_told_before_minutes_are_spent(command, monkeypatch):
    for name in ("decode_rows", "size_rows", "phase_rows", "v2_rows"):
        monkeypatch.setattr(commands, name, lambda *_, **__: pytest.fail("computed first"))
    done = CliRunner().invoke(commands.main, [command, "--out", "/proc/results"])
    assert isinstance(done.exception, InputError)
    assert str(done.exception).startswith("--out /proc/results: No such file or directory")


def test_fill_replaces_between_markers_only(tmp_path):
    (tmp_path / "x.md").write_text("title\n| a |\n|---|\n")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: x -->\nold\n<!-- end -->\nafter\n")
    fill(page, tmp_path)
    fill(page, tmp_path)
    assert page.read_text() == "before\n<!-- table: x -->\n| a |\n|---|\n<!-- end -->\nafter\n"


def test_a_missing_result_names_the_command(tmp_path):
    with pytest.raises(InputError, match=r"bench\.capacity all"):
        table_named("nothing", tmp_path)


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no simulated results yet")
def test_page_is_up_to_date_and_entries_are_valid(tmp_path):
    from bench.publish.summary import load_figures

    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "capacity_results.md").read_text())
    fill(page, RESULTS)
    assert page.read_text() == (ROOT / "docs" / "capacity_results.md").read_text()
    names = {figure.name for figure in load_figures(RESULTS / "summary_entries.json")}
    assert names == {
        "simulate.calibration_error_pct.max", "simulate.ep320.seconds",
        "simulate.deepseek_v3_ep32.tpot_gain_pct", "simulate.deepseek_v3_ep144.tpot_gain_pct",
    }  # fmt: skip
    for file in RESULTS.glob("*.json"):
        data = json.loads(file.read_text())
        assert data.get("kind", "simulated") == "simulated"


def test_results_elsewhere_leave_the_page_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "decode_rows", lambda plan, test, done: [])
    monkeypatch.setattr(commands, "decode_table", lambda rows: "| none |")
    before = (ROOT / commands.PAGE).read_bytes()
    done = CliRunner().invoke(commands.main, ["decode", "--out", str(tmp_path / "trial")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "trial" / "decode-rules.md").read_text() == "| none |\n"
    assert (ROOT / commands.PAGE).read_bytes() == before
