"""The planner's benchmark on a small synthetic trace: tables and summary entries are complete and consistent."""

from __future__ import annotations

import csv
import json

from click.testing import CliRunner

from bench.planner.__main__ import main
from bench.planner.synthetic import synthetic_trace
from bench.summary import parse_figures


def test_quality_and_curves(tmp_path):  # type: ignore[no-untyped-def]
    path = tmp_path / "small.npz"
    synthetic_trace(1024, 2, 32, 4).save(path)
    args = ["--trace", str(path), "--part", "quality", "--part", "floor", "--seeds", "1", "--floor-layers", "1"]
    result = CliRunner().invoke(
        main, [*args, "--floor-scale", "2", "--out", str(tmp_path / "out")], catch_exceptions=False
    )
    assert result.exit_code == 0
    rows = list(csv.DictReader((tmp_path / "out" / "quality.csv").open()))
    assert {row["arm"] for row in rows} >= {"deepseek", "deepseek_hierarchical", "affinity fast", "affinity thorough"}
    for row in rows:
        assert float(row["gpu_fanout"]) >= float(row["node_fanout"]) >= 1
        assert row["arm"] != "deepseek" or float(row["gpu_fanout_ratio"]) == 1
    figures = parse_figures(json.loads((tmp_path / "out" / "summary_entries.json").read_text()), "summary_entries.json")
    assert "planner.small.8x2.node_fanout_ratio" in {figure.name for figure in figures}
