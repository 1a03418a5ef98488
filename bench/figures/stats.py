"""Comparing two arms by blocks: log-ratios, intervals, many comparisons, the noise floor.

Requests are never pooled over blocks: requests of one server start share its fate, blocks do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Ratio:
    """``ratio`` is the geometric mean over blocks of arm / baseline; ``lower`` and ``upper`` its interval.

    With one block there is no interval: both are NaN, and so is ``p_value`` (two-sided, of ratio = 1).
    """

    ratio: float
    lower: float
    upper: float
    p_value: float
    blocks: int

    def as_dict(self, digits: int = 4) -> dict[str, Any]:
        """For JSON, which has no NaN: ratio, lower, upper (None with one block) and blocks."""
        return {
            **_finite({"ratio": self.ratio, "lower": self.lower, "upper": self.upper}, digits),
            "blocks": self.blocks,
        }

    def gain_pct(self, digits: int = 2) -> dict[str, Any]:
        """How many percent more the arm has than the baseline: value, lower, upper, blocks."""
        bounds = {"value": self.ratio - 1, "lower": self.lower - 1, "upper": self.upper - 1}
        return {**_finite({name: 100 * bound for name, bound in bounds.items()}, digits), "blocks": self.blocks}

    def loss_pct(self, digits: int = 3) -> dict[str, Any]:
        """How many percent less; its upper bound is the ratio's lower one."""
        bounds = {"value": 1 - self.ratio, "lower": 1 - self.upper, "upper": 1 - self.lower}
        return {**_finite({name: 100 * bound for name, bound in bounds.items()}, digits), "blocks": self.blocks}


def _finite(values: Mapping[str, float], digits: int) -> dict[str, float | None]:
    return {name: round(value, digits) if math.isfinite(value) else None for name, value in values.items()}


def ratio_by_block(arm: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95) -> Ratio:
    """Ratio of two arms from their values by block; only blocks that both have count.

    The logarithms of the ratios are taken as normal over blocks, so the interval is Student's t on them. Raises
    ValueError when no block is common to both or a value is not positive.
    """
    blocks = sorted(set(arm) & set(baseline))
    if not blocks:
        raise ValueError("no block has both arms")
    pairs = np.array([(arm[b], baseline[b]) for b in blocks], dtype=float)
    if not (np.isfinite(pairs).all() and (pairs > 0).all()):
        raise ValueError("a ratio needs positive values")
    logs = np.log(pairs[:, 0] / pairs[:, 1])
    center, n = float(logs.mean()), len(logs)
    if n < 2:
        return Ratio(math.exp(center), math.nan, math.nan, math.nan, n)
    error = float(logs.std(ddof=1)) / math.sqrt(n)
    margin = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
    # Equal ratios in every block have no error: the test then says 0 (or 1 if they are all exactly 1).
    p_value = float(2 * stats.t.sf(abs(center) / error, n - 1)) if error else float(center == 0)
    return Ratio(math.exp(center), math.exp(center - margin), math.exp(center + margin), p_value, n)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Geometric mean of one figure over blocks and its interval (Student's t on the logarithms), NaN for one block.

    Raises ValueError without a value or for one that is not positive.
    """
    found = np.array([v for v in values if not math.isnan(v)], dtype=float)
    if not len(found) or not (found > 0).all():
        raise ValueError("a geometric mean needs positive values")
    logs = np.log(found)
    center = float(logs.mean())
    if len(logs) < 2:
        return math.exp(center), math.nan, math.nan
    margin = float(stats.t.ppf(0.5 + confidence / 2, len(logs) - 1)) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    return math.exp(center), math.exp(center - margin), math.exp(center + margin)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for having looked at all of them (Holm, 1979); NaN stays NaN and counts for nothing."""
    adjusted = [math.nan] * len(p_values)
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def noise_floor_pct(ratios: Sequence[float]) -> float:
    """The difference in % that two runs of the same server show: 95th percentile over A/A pairs.

    ``ratios`` are A/A ratios of single blocks and cells; 0.9 and 1/0.9 are equally far from 1.
    Raises ValueError when there are none.
    """
    if not len(ratios):
        raise ValueError("no A/A pair was measured")
    away = [100.0 * (math.exp(abs(math.log(r))) - 1.0) for r in ratios]
    return float(np.percentile(away, 95))
