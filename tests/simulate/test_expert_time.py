"""Simulated time of experts by active slots, against times measured on an H200."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bench.calibration import expert_fit
from bench.capacity import expert_times
from bench.harness.engine import ROOT
from bench.micro.expert_slots import SHAPES
from bench.publish.summary import parse_figures
from sglang_eplb_affinity.simulate.expert_time import MASKED_BF16, MASKED_FP8, active_slots, experts_us, masked_tile
from sglang_eplb_affinity.simulate.system import load_system


@pytest.fixture(scope="module")
def times() -> list[expert_times.ExpertTime]:
    return expert_times.compare(ROOT)


def test_measured_times_are_met(times: list[expert_times.ExpertTime]) -> None:
    cases = [time.case for time in times]
    assert {case.slots for case in cases} >= {8, 9, 32, 36, 48} and {case.tokens for case in cases} >= {8, 512}
    assert {(case.shape, case.dtype) for case in cases} == {
        (shape.name, dtype) for shape in SHAPES for dtype in ("bf16", "fp8")
    }
    assert expert_times.largest(times) <= 10
    common = {"versions": {"numpy": "2"}, "commit": "abcdef0", "date": "2026-01-01", "command": "x"}
    (figure,) = parse_figures([expert_times.entry(times, common)], "entries")
    assert figure.value == pytest.approx(expert_times.largest(times), abs=0.01)
    assert expert_times.table(times).count("\n") == 8


def test_a_slot_more_costs_a_wave_where_it_begins_one(times: list[expert_times.ExpertTime]) -> None:
    # 6 waves of 132 tiles either way; with 176 columns the last is fuller than with 192
    assert masked_tile(1, 4096, 32, 192) == (64, 176) and masked_tile(100, 4096, 32, 256) == (128, 256)
    of = {(time.case.dtype, time.case.slots): time for time in times if time.case.shape == "qwen3-235b"}
    for dtype in ("bf16", "fp8"):
        nine, eight = of[dtype, 9], of[dtype, 8]
        assert nine.model_us / eight.model_us == pytest.approx(nine.measured_us / eight.measured_us, rel=0.15)


def test_constants_are_fitted_with_and_without_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert expert_fit.main(["--rounds", "1", "--without", "qwen3-235b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("  ")] == [
        "  fitted: 55 cases",
        "  left out: 30 cases",
    ] * 2
    for dtype, served in (("bf16", MASKED_BF16), ("fp8", MASKED_FP8)):
        cases = [
            expert_fit.Measured(case, expert_times.inputs_of(case), us)
            for case, us in expert_times.measured(ROOT)
            if case.dtype == dtype
        ]
        slower = dataclasses.replace(served, wave_us=(2 * served.wave_us[0], 2 * served.wave_us[1]))
        assert abs(expert_fit.errors(cases, served)).max() < abs(expert_fit.errors(cases, slower)).max()


def us(rows: list[float], masked: bool = False) -> float:
    system = load_system("deepseek-v3-h200")
    return float(experts_us(np.array([rows]), system.model, system.gpu, masked)[0])


def test_few_tokens_cost_slots_and_many_cost_products() -> None:
    for masked in (False, True):
        assert us([2.0] * 32, masked) == pytest.approx(us([4.0] * 32, masked), rel=0.02)
        assert us([2.0] * 36, masked) / us([2.0] * 32, masked) > 1.05
        assert us([4096.0] * 32, masked) == pytest.approx(2 * us([2048.0] * 32, masked), rel=0.05)
    assert us([2.0] * 32 + [0.0] * 4) == us([2.0] * 32)
    # 132 tiles make a wave: 8 slots of 256 rows of FP8 just fill whole ones, a ninth begins another
    assert us([256.0] * 9) / us([256.0] * 8) > 1.1


@pytest.mark.parametrize("masked", [False, True])
def test_gpus_are_apart(masked: bool) -> None:
    system = load_system("deepseek-v3-h200")
    rows = np.array([[1.0, 0.0, 3.0], [0.4, 0.0, 0.0]])
    assert active_slots(rows).tolist() == [2, 0]
    both = experts_us(rows, system.model, system.gpu, masked)
    assert both[0] == us([1.0, 0.0, 3.0], masked) and both[1] < both[0]
    half = dataclasses.replace(system.gpu, hbm_gb_per_s=system.gpu.hbm_gb_per_s / 2)
    assert experts_us(rows, system.model, half, masked)[0] > 1.5 * both[0]
