"""Plots of the recorded routing under each placement, and of rebalances over the ITL of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bench.figures.placements import PlacementView
from bench.figures.rebalance_log import Rebalance
from bench.figures.server_log import unix_time
from bench.harness.arms import ARMS
from bench.harness.run_folder import RunFolder, RunPlan
from bench.publish.plots import STYLE, finish, plain, write_note

COMPUTED = "computed from the routing that the run recorded: planned on one half of the tokens, shown on the other"


def coactivation_plot(views: Sequence[PlacementView], layers: Sequence[int], note: str = "") -> Figure:
    """A heat map for each layer and placement; rows and columns are slots in the order of GPUs, which lines part.

    What lies inside the blocks on the diagonal stays on a GPU; the title says how much that is.
    """
    figure = Figure(figsize=(3.9 * len(views), 3.7 * len(layers) + 0.6), layout="constrained")
    for line, layer in zip(figure.subplots(len(layers), len(views), squeeze=False), layers, strict=True):
        brightest = max(float(np.percentile(v.coactivation[layer], 99.5)) for v in views)
        for axes, one in zip(line, views, strict=True):
            matrix = one.coactivation[layer]
            image = axes.imshow(100 * matrix, cmap="magma", vmin=0, vmax=100 * brightest, interpolation="nearest")
            per_gpu = len(matrix) // one.topology.num_gpus
            for edge in range(per_gpu, len(matrix), per_gpu):
                axes.axhline(edge - 0.5, color="white", linewidth=0.7)
                axes.axvline(edge - 0.5, color="white", linewidth=0.7)
            axes.set_title(f"layer {layer}, {ARMS[one.arm].title}: {100 * inside(matrix, per_gpu):.0f} % on one GPU")
            axes.title.set_fontsize(9)
            axes.set_xticks([])
            axes.set_yticks([])
        figure.colorbar(image, ax=line, shrink=0.8, label="tokens that chose both [%]")
    finish(figure, f"Co-activation of slots, by layer ({COMPUTED})", note)
    return figure


def inside(matrix: np.ndarray, slots_per_gpu: int) -> float:
    """The part of a slot co-activation matrix within the diagonal blocks of GPUs."""
    blocks = len(matrix) // slots_per_gpu
    own = matrix.reshape(blocks, slots_per_gpu, blocks, slots_per_gpu)
    return float(sum(own[i, :, i, :].sum() for i in range(blocks)) / max(matrix.sum(), 1e-12))


def load_plot(views: Sequence[PlacementView], note: str = "") -> Figure:
    """Load of every GPU over the mean GPU: the bar is the mean over layers, each dot a layer."""
    figure = Figure(figsize=(3.6 * len(views), 3.8), layout="constrained")
    for axes, one in zip(figure.subplots(1, len(views), sharey=True, squeeze=False).flat, views, strict=True):
        gpus = np.arange(one.topology.num_gpus)
        axes.bar(gpus, one.gpu_load.mean(0), color=STYLE[one.arm][0], alpha=0.75)
        for layer in one.gpu_load:
            axes.plot(gpus, layer, "k.", markersize=3, alpha=0.5)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_title(f"{ARMS[one.arm].title}: max/mean {one.gpu_load.max(1).mean():.3f}")
        axes.set_xlabel("GPU")
        axes.set_xticks(gpus)
        plain(axes)
    figure.axes[0].set_ylabel("load / mean GPU")
    finish(figure, f"Load by GPU ({COMPUTED})", note)
    return figure


def fanout_plot(views: Sequence[PlacementView], note: str = "") -> Figure:
    """How many GPUs a token's experts are on, over all layers."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(views)
    for i, one in enumerate(views):
        places = np.arange(1, len(one.fanout))
        share = 100 * one.fanout[1:] / max(one.fanout.sum(), 1)
        label = f"{ARMS[one.arm].title} (mean {one.mean_fanout:.2f})"
        axes.bar(places + (i - (len(views) - 1) / 2) * width, share, width, color=STYLE[one.arm][0], label=label)
    axes.set_xlabel("GPUs that a token visits")
    axes.set_ylabel("tokens [%]")
    axes.set_xticks(np.arange(1, len(views[0].fanout)))
    plain(axes)
    axes.legend(frameon=False)
    figure.suptitle(f"Fan-out ({COMPUTED})", x=0.01, ha="left", fontsize=12)
    write_note(figure, note)
    return figure


@dataclass(frozen=True)
class RowTimeline:
    """ITL over one row in bins (see bench.figures.steady.timeline) and its rebalances, s from the start of the row."""

    title: str
    arm: str
    time: np.ndarray
    p50_itl_ms: np.ndarray
    max_itl_ms: np.ndarray
    rebalances: tuple[tuple[float, Rebalance], ...]


def row_timelines(folder: RunFolder, plan: RunPlan) -> list[RowTimeline]:
    """Of the first block that has them, at the largest concurrency: one for each arm whose row counts."""
    latest = folder.store.latest()
    level = max(plan.concurrency)
    for block in range(plan.blocks):
        found = []
        for cell in plan.cells():
            path = folder.path / "cells" / cell.name / "timeline.npz"
            record = latest.get(cell)
            if (
                (cell.block, cell.concurrency, cell.load) != (block, level, "")
                or record is None
                or record.void
                or not path.is_file()
            ):
                continue
            found.append(_timeline(path, f"{ARMS[cell.arm].title}, concurrency {level}", cell.arm, record.rebalances))
        if found:
            return sorted(found, key=lambda row: list(ARMS).index(row.arm))
    return []


def _timeline(path: Path, title: str, arm: str, rebalances: Sequence[Rebalance]) -> RowTimeline:
    with np.load(path, allow_pickle=False) as data:
        epoch = float(data["epoch"])
        at = tuple((unix_time(r.time) - epoch, r) for r in rebalances if r.time)
        return RowTimeline(title, arm, data["time"], data["p50_itl_ms"], data["max_itl_ms"], at)


def timeline_plot(rows: Sequence[RowTimeline], note: str = "") -> Figure:
    """ITL over a row, with a line where a rebalance ended: solid if it moved experts, dotted if not."""
    figure = Figure(figsize=(11, 2.6 * max(len(rows), 1) + 0.8), layout="constrained")
    if not rows:
        figure.text(0.5, 0.5, "No row has a timeline.", ha="center", va="center")
        write_note(figure, note)
        return figure
    panels = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False).flat
    for axes, one in zip(panels, rows, strict=True):
        axes.fill_between(one.time, one.p50_itl_ms, one.max_itl_ms, color=STYLE[one.arm][0], alpha=0.25, linewidth=0)
        axes.plot(one.time, one.p50_itl_ms, color=STYLE[one.arm][0], linewidth=1.4, marker=".", markersize=3)
        for at, rebalance in one.rebalances:
            axes.axvline(at, color="black", linewidth=0.9, linestyle="-" if rebalance.moved else ":")
        axes.set_title(f"{one.title} ({len(one.rebalances)} rebalances)", fontsize=10, loc="left")
        axes.set_yscale("log")
        axes.set_ylabel("ITL [ms]")
        plain(axes)
    figure.axes[-1].set_xlabel("time in the row [s]")
    title = "Rebalances over ITL: median (line) and largest (area) of every 0.1 s; vertical lines: end of a rebalance"
    finish(figure, title, note)
    return figure
