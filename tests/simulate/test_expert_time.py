"""Simulated time of experts by active slots, against times measured on an H200."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bench.capacity import expert_times
from bench.harness.engine import ROOT
from bench.publish.summary import parse_figures
from sglang_eplb_affinity.simulate.expert_time import active_slots, experts_us
from sglang_eplb_affinity.simulate.system import load_system


@pytest.fixture(scope="module")
def times() -> list[expert_times.ExpertTime]:
    return expert_times.compare(ROOT / expert_times.MEASURED)


def test_measured_times_are_met(times: list[expert_times.ExpertTime]) -> None:
    fitted = [time.case for time in times if time.case.shape == expert_times.FITTED]
    assert {case.slots for case in fitted} >= {8, 9, 32, 36} and {case.tokens for case in fitted} >= {8, 512}
    assert {case.dtype for case in fitted} == {"bf16", "fp8"}
    assert expert_times.largest(times, expert_times.FITTED) <= 10
    assert expert_times.largest(times, "h200-x2-auto") <= 15
    common = {"versions": {"numpy": "2"}, "commit": "abcdef0", "date": "2026-01-01", "command": "x"}
    (figure,) = parse_figures([expert_times.entry(times, common)], "entries")
    assert figure.value == pytest.approx(expert_times.largest(times, expert_times.FITTED), abs=0.01)
    assert expert_times.table(times).count("\n") == 6


def us(rows: list[float]) -> float:
    system = load_system("deepseek-v3-h200")
    return float(experts_us(np.array([rows]), system.model, system.gpu)[0])


def test_few_tokens_cost_slots_and_many_cost_products() -> None:
    assert us([2.0] * 32) == pytest.approx(us([4.0] * 32), rel=0.01)
    assert 1.09 < us([2.0] * 36) / us([2.0] * 32) < 1.13
    assert us([2.0] * 32 + [0.0] * 4) == us([2.0] * 32)
    assert us([4096.0] * 32) == pytest.approx(2 * us([2048.0] * 32), rel=0.05)
    # 132 tiles make a wave: 8 slots of 256 rows of FP8 just fill whole ones, a ninth begins another
    assert us([256.0] * 9) / us([256.0] * 8) > 1.1


def test_gpus_are_apart() -> None:
    system = load_system("deepseek-v3-h200")
    rows = np.array([[1.0, 0.0, 3.0], [0.4, 0.0, 0.0]])
    assert active_slots(rows).tolist() == [2, 0]
    both = experts_us(rows, system.model, system.gpu)
    assert both[0] == us([1.0, 0.0, 3.0]) and both[1] < both[0]
    half = dataclasses.replace(system.gpu, hbm_gb_per_s=system.gpu.hbm_gb_per_s / 2)
    assert experts_us(rows, system.model, half)[0] > 1.5 * both[0]
