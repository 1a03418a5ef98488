import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from bench.figures.compare import block_ratios, compare
from bench.figures.stats import holm, noise_floor_pct, ratio_by_block


def test_interval_is_students_t_on_the_log_ratios() -> None:
    arm, base = {0: 9.0, 1: 11.0, 2: 10.0, 7: 1.0}, {0: 10.0, 1: 10.5, 2: 10.1, 8: 1.0}
    found = ratio_by_block(arm, base)
    logs = np.log([9 / 10, 11 / 10.5, 10 / 10.1])
    low, high = scipy_stats.t.interval(0.95, 2, loc=logs.mean(), scale=scipy_stats.sem(logs))
    expected = scipy_stats.ttest_1samp(logs, 0.0)
    assert found.blocks == 3
    assert found.ratio == pytest.approx(math.exp(logs.mean()))
    assert (found.lower, found.upper) == pytest.approx((math.exp(low), math.exp(high)))
    assert found.p_value == pytest.approx(expected.pvalue)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        noise = rng.normal(0, 0.05, (2, 5))
        found = ratio_by_block(dict(enumerate(0.96 * np.exp(noise[0]))), dict(enumerate(np.exp(noise[1]))))
        covered += found.lower <= 0.96 <= found.upper
    assert 0.92 <= covered / 400 <= 0.98


def test_one_block_has_no_interval() -> None:
    found = ratio_by_block({0: 2.0}, {0: 4.0})
    assert found.ratio == 0.5 and math.isnan(found.lower) and math.isnan(found.p_value)


@pytest.mark.parametrize(("arm", "base"), [({0: 1.0}, {1: 1.0}), ({0: 0.0}, {0: 1.0}), ({0: math.nan}, {0: 1.0})])
def test_no_ratio_without_common_blocks_or_positive_values(arm: dict[int, float], base: dict[int, float]) -> None:
    with pytest.raises(ValueError):
        ratio_by_block(arm, base)


def test_holm_against_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    with_gap = holm([0.02, math.nan])
    assert with_gap[0] == 0.02 and math.isnan(with_gap[1])


def test_noise_floor_is_symmetric() -> None:
    assert noise_floor_pct([1 / 1.02]) == pytest.approx(2.0)
    assert noise_floor_pct([1.02, 0.99]) == pytest.approx(noise_floor_pct([1 / 1.02, 1 / 0.99]))
    with pytest.raises(ValueError):
        noise_floor_pct([])


def table() -> pd.DataFrame:
    rows = []
    for block, drift in enumerate((1.0, 1.3, 0.8)):  # a machine that drifts between blocks, not within them
        for arm, factor in (("vanilla", 1.0), ("affinity", 0.95), ("none", 1.1)):
            row = {"block": block, "arm": arm, "concurrency": 4, "valid": True}
            rows.append({**row, "p90_tpot_ms": 20.0 * drift * factor})
    return pd.DataFrame(rows)


def test_compare_pairs_by_block_so_that_drift_cancels() -> None:
    found = compare(table(), "vanilla", ["p90_tpot_ms"]).set_index("arm")
    assert found.loc["affinity", "ratio"] == pytest.approx(0.95)
    assert found.loc["affinity", "upper"] == pytest.approx(0.95)
    assert set(found.index) == {"affinity", "none"}


def test_compare_leaves_void_rows_out() -> None:
    frame = table()
    frame.loc[(frame["block"] == 1) & (frame["arm"] == "affinity"), "valid"] = False
    found = compare(frame, "vanilla", ["p90_tpot_ms"]).set_index("arm")
    assert (found.loc["affinity", "blocks"], found.loc["none", "blocks"]) == (2, 3)


def test_compare_without_the_baseline_is_empty() -> None:
    frame = table()
    assert compare(frame[frame["arm"] != "vanilla"], "vanilla", ["p90_tpot_ms"]).empty


def test_block_ratios_are_one_for_each_block() -> None:
    assert block_ratios(table(), "affinity", "vanilla", ["p90_tpot_ms"]) == pytest.approx([0.95] * 3)
