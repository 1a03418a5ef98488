"""Load of single passes: the linear programme against cases worked out by hand, and the command on a trace."""

import csv
import io
import sys

import numpy as np
from click.testing import CliRunner

from bench.harness.engine import ROOT
from bench.planner.pass_balance import deal, entries, least_load, main


def test_the_programme_makes_the_most_loaded_gpu_as_light_as_the_map_allows() -> None:
    row = np.array([0, 1, 0, 2])  # two GPUs of two slots; expert 0 is on both
    experts = np.repeat([0, 1, 2], [10, 6, 2])
    load = least_load(experts, row, 3, 2).reshape(2, 2).sum(1)
    assert np.allclose(load, 9)
    experts = np.repeat([0, 1, 2], [2, 20, 2])  # nothing can help GPU 0
    assert np.allclose(least_load(experts, row, 3, 2).reshape(2, 2).sum(1).max(), 20)


def test_dealing_follows_the_shares() -> None:
    row = np.array([0, 1, 0, 2])
    experts = np.repeat([0, 1, 2], [10, 6, 2])
    slots = deal(experts, np.array([3.0, 6.0, 7.0, 2.0]), row, np.random.default_rng(1))
    assert (row[slots] == experts).all()
    assert np.bincount(slots, minlength=4).tolist() == [3, 6, 7, 2]


def test_the_command_compares_every_choice(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pass_balance"])
    data = ROOT / "bench" / "data"
    trace = f"{data / 'tiny_moe_plan.npz'},{data / 'tiny_moe_test.npz'}"
    options = ["--trace", trace, "--gpus", "4", "--redundant", "16", "--pass-tokens", "2000", "--layer-step", "6"]
    done = CliRunner().invoke(main, [*options, "--passes", "mixed"], catch_exceptions=False)
    rows = {row["arm"]: row for row in csv.DictReader(io.StringIO(done.output))}
    load = {arm: float(row["pass_load_max_over_mean"]) for arm, row in rows.items()}
    assert load["affinity, lp"] <= min(load["affinity, cover"], load["affinity, cover_balanced"])
    assert 0.98 < float(rows["affinity, cover_balanced"]["fanout_ratio_to_cover"]) < 1.02
    values = [{**row, "pass_load_max_over_mean": load[arm]} for arm, row in rows.items()]
    assert {entry["name"].rpartition(".")[2] for entry in entries(values, "c")} == {
        "pass_load",
        "gpu_fanout_ratio_to_cover",
    }
