"""Arms against a baseline, cell by cell, with intervals over blocks."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from bench.figures.stats import Ratio, holm, ratio_by_block

COLUMNS = ("concurrency", "arm", "baseline", "metric", "ratio", "lower", "upper", "p_value", "p_holm", "blocks")


def compare(frame: pd.DataFrame, baseline: str, metrics: Sequence[str]) -> pd.DataFrame:
    """Ratio of every other arm to ``baseline`` for each metric and concurrency, from rows that count.

    Input is the tidy table. ``p_holm`` is adjusted over all rows returned. Cells without a common block are left out.
    """
    valid = frame[frame["valid"]]
    rows = []
    for concurrency, cells in valid.groupby("concurrency", sort=True):
        by_arm = {arm: rows_of.set_index("block") for arm, rows_of in cells.groupby("arm", sort=False)}
        if baseline not in by_arm:
            continue
        for arm, values in by_arm.items():
            if arm == baseline:
                continue
            for metric in metrics:
                try:
                    found = ratio_by_block(values[metric].to_dict(), by_arm[baseline][metric].to_dict())
                except (KeyError, ValueError):
                    continue
                rows.append((concurrency, arm, baseline, metric, *_interval(found), float("nan"), found.blocks))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["p_holm"] = holm(table["p_value"].tolist())
    return table


def _interval(found: Ratio) -> tuple[float, float, float, float]:
    return found.ratio, found.lower, found.upper, found.p_value


def block_ratios(frame: pd.DataFrame, arm: str, baseline: str, metrics: Sequence[str]) -> list[float]:
    """The single ratios behind `compare`, one for each block, concurrency and metric: the input of a noise floor."""
    valid = frame[frame["valid"]]
    pairs = valid[valid["arm"] == arm].merge(
        valid[valid["arm"] == baseline], on=["block", "concurrency"], suffixes=("", "_baseline")
    )
    return [
        float(row[metric] / row[f"{metric}_baseline"])
        for row in pairs.to_dict("records")
        for metric in metrics
        if row[metric] > 0 and row[f"{metric}_baseline"] > 0
    ]
