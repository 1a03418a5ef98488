"""Plots of a run, made from its tidy table and its rebalances; each function returns a matplotlib Figure."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from textwrap import wrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.figures.stats import mean_interval
from bench.harness.arms import ARMS
from bench.publish.sections import HEADLINE
from bench.publish.table import PLACEMENT_TITLES

# Okabe and Ito's colours: they stay apart for colour-blind readers and in print.
_COLOURS = ("#7f7f7f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
_TITLE_INCHES = 0.26  # of a figure's height
STYLE = {arm: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]) for i, arm in enumerate(ARMS)}
_AXIS = {
    "p50_ttft_ms": "P50 time to first token [ms]",
    "p90_tpot_ms": "P90 time per output token [ms]",
    "p95_itl_ms": "P95 inter-token latency [ms]",
    "qps": "throughput [requests/s]",
}


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; no display or pyplot state is involved."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def latency_plot(frame: pd.DataFrame, note: str = "") -> Figure:
    """The four headline metrics against concurrency, one line an arm: geometric mean over blocks, bar: 95 % interval.

    One block has no interval. Rows that do not count are left out.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    valid = frame[frame["valid"]]
    for axes, metric in zip(figure.subplots(2, 2).flat, HEADLINE, strict=True):
        for arm in _arms(valid):
            rows = valid[valid["arm"] == arm]
            if metric not in rows or rows[metric].isna().all():
                continue
            found = {c: mean_interval(v) for c, v in rows.groupby("concurrency")[metric].apply(list).items()}
            spread = pd.DataFrame.from_dict(found, orient="index", columns=["mean", "lower", "upper"])
            colour, marker = STYLE[arm]
            axes.errorbar(
                spread.index,
                spread["mean"],
                yerr=[(spread["mean"] - spread["lower"]).fillna(0), (spread["upper"] - spread["mean"]).fillna(0)],
                label=ARMS[arm].title,
                color=colour,
                marker=marker,
                capsize=3,
                linewidth=1.8,
                alpha=0.85,
            )
        _concurrency_axis(axes, valid)
        axes.set_ylabel(_AXIS[metric])
        axes.set_ylim(0, 1.06 * axes.get_ylim()[1])  # a single level must not sit on the upper edge
    finish(figure, "Latency and throughput against concurrency", note)
    return figure


def placement_plot(frame: pd.DataFrame, titles: Mapping[str, str] = PLACEMENT_TITLES, note: str = "") -> Figure:
    """Balancedness and fan-outs by arm: the initial placement (pale) and the placement in use (full), over all rows."""
    valid = frame[frame["valid"]]
    names = [name for name in titles if f"{name}_initial" in valid and valid[f"{name}_initial"].notna().any()]
    width = max(3.6, 0.9 * valid["arm"].nunique())
    figure = Figure(figsize=(width * max(len(names), 1), 4.2), layout="constrained")
    if not names:
        figure.text(0.5, 0.5, "The server log has no placement figures.", ha="center", va="center")
        write_note(figure, note)
        return figure
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        arms = [arm for arm in _arms(valid) if valid.loc[valid["arm"] == arm, f"{name}_initial"].notna().any()]
        for i, arm in enumerate(arms):
            rows = valid[valid["arm"] == arm]
            pairs = (("initial", -0.2, 0.35), ("served", 0.2, 0.95))
            for column, shift, alpha in pairs:
                values = rows[f"{name}_{column}"].dropna()
                if values.empty:
                    continue
                height = float(values.median())
                axes.bar(i + shift, height, width=0.38, color=STYLE[arm][0], alpha=alpha)
                axes.annotate(f"{height:.3f}", (i + shift, height), ha="center", va="bottom", fontsize=9)
        axes.set_xticks(range(len(arms)), ["\n".join(wrap(ARMS[arm].title, 10)) for arm in arms])
        axes.set_title(titles[name], fontsize=10)
        axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
        plain(axes)
    figure.suptitle("Placement before (pale) and after (full), on the traffic that was served", fontsize=12)
    write_note(figure, note)
    return figure


def rebalance_plot(rebalances: pd.DataFrame, note: str = "") -> Figure:
    """Every rebalance in order: experts moved, and GPU fan-out and balancedness of the placement that it found.

    Input: columns arm, block, concurrency, moved_experts, result, balancedness_before, gpu_fanout_before, one row a
    rebalance in order of time.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    rows: Sequence[tuple[str, str]] = (
        ("moved_experts", "experts moved"),
        ("balancedness_before", "balancedness\non traffic served"),
        ("gpu_fanout_before", "GPU fan-out\non traffic served"),
    )
    for axes, (column, label) in zip(figure.subplots(len(rows), 1, sharex=True).flat, rows, strict=True):
        for arm in _arms(rebalances):
            own = rebalances[rebalances["arm"] == arm].reset_index(drop=True)
            colour, marker = STYLE[arm]
            axes.plot(own.index + 1, own[column], color=colour, marker=marker, markersize=4, label=ARMS[arm].title)
        axes.set_ylabel(label)
        plain(axes)
    if rebalances.empty:
        figure.text(0.5, 0.5, "No rebalance was measured.", ha="center", va="center")
    figure.axes[-1].set_xlabel("rebalance of the measured rows, in order of time")
    finish(figure, "Rebalances", note)
    return figure


def ratio_plot(ratios: pd.DataFrame, note: str = "") -> Figure:
    """Ratios to the baseline with their intervals (output of `compare`, not empty), one panel a metric."""
    metrics = list(dict.fromkeys(ratios["metric"]))
    figure = Figure(figsize=(4.2 * len(metrics), 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False).flat, metrics, strict=True):
        chosen = ratios[ratios["metric"] == metric]
        arms = _arms(chosen)
        for i, arm in enumerate(arms):
            own = chosen[chosen["arm"] == arm]
            colour, marker = STYLE[arm]
            bars = [(own["ratio"] - own["lower"]).fillna(0), (own["upper"] - own["ratio"]).fillna(0)]
            spread = own["concurrency"] * 1.06 ** (i - (len(arms) - 1) / 2)  # beside, not over, each other
            axes.errorbar(spread, own["ratio"], yerr=bars, fmt=marker, color=colour, capsize=3, label=ARMS[arm].title)
        axes.axhline(1.0, color="black", linewidth=0.8)
        _concurrency_axis(axes, chosen)
        axes.set_title(HEADLINE.get(metric, metric).removesuffix(" ms"))
    finish(figure, f"Ratio to {ARMS[ratios['baseline'].iloc[0]].title} (below 1 is less)", note)
    return figure


def _arms(frame: pd.DataFrame) -> list[str]:
    return [arm for arm in ARMS if arm in set(frame["arm"])] if len(frame) else []


def _concurrency_axis(axes: Axes, frame: pd.DataFrame) -> None:
    levels = sorted(set(frame["concurrency"])) if len(frame) else []
    axes.set_xlabel("concurrency")
    if levels:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(levels))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(levels[0] / math.sqrt(2), levels[-1] * math.sqrt(2))
    plain(axes)


def plain(axes: Axes) -> None:
    axes.grid(True, axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def finish(figure: Figure, title: str, note: str) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:  # in a line of its own: beside the title there is no room for many arms
        below = 1 - _TITLE_INCHES / figure.get_figheight()
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0, below), ncols=len(labels), frameon=False,
            borderaxespad=0,
        )  # fmt: skip
        title += "\n"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    write_note(figure, note)


def write_note(figure: Figure, note: str) -> None:
    if note:
        figure.supxlabel("\n".join(wrap(note, 150)), fontsize=9, color="#a00000")
