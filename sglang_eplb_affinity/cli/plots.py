"""Pictures for ``inspect`` (matplotlib, without a display)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from sglang_eplb_affinity.cli.picture import LayerPicture, tokens_of
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology


def _figure(columns: int, rows: int = 1):  # type: ignore[no-untyped-def]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs the package matplotlib, which is not installed") from None
    figure = Figure(figsize=(6.5 * columns, 4.8 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def _save(figure, path: Path) -> None:  # type: ignore[no-untyped-def]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def plot_routing(window: RoutingWindow, picture: LayerPicture, gpu_load: np.ndarray | None, path: Path) -> None:
    """What the recording and the map tell of: load of every expert by layer, one layer's co-activation with experts by
    falling load, load of every GPU by layer (``gpu_load`` float64 [layers, gpus]), and that layer's GPU fan-out."""
    panels = [lambda figure, axis: _expert_load(figure, axis, window)]
    if window.coactivation is not None:
        panels.append(lambda figure, axis: _coactivation(figure, axis, window, picture.layer))
    if gpu_load is not None:
        panels.append(lambda figure, axis: _gpu_load(figure, axis, gpu_load))
    if picture.fanout is not None:
        panels.append(lambda figure, axis: _fanout(axis, picture))
    figure, axes = _figure(min(len(panels), 2), -(-len(panels) // 2))
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for draw, axis in zip(panels, axes, strict=False):
        draw(figure, axis)
    _save(figure, path)


def _expert_load(figure: Any, axis: Any, window: RoutingWindow) -> None:
    share = window.counts / np.maximum(window.counts.mean(1, keepdims=True), 1e-9)
    image = axis.imshow(share, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=axis, label="load / mean expert")
    axis.set(xlabel="logical expert", ylabel="layer", title="Expert load")


def _coactivation(figure: Any, axis: Any, window: RoutingWindow, layer: int) -> None:
    assert window.coactivation is not None
    counts = window.counts[layer]
    lift = window.coactivation[layer] * tokens_of(window, layer) / np.maximum(counts[:, None] * counts[None, :], 1)
    order = np.argsort(-counts, kind="stable")
    image = axis.imshow(np.log2(np.maximum(lift[order][:, order], 1 / 16)), cmap="RdBu_r", vmin=-4, vmax=4)
    figure.colorbar(image, ax=axis, label="log2 lift (0: independent)")
    axis.set(xlabel="expert, hottest first", ylabel="expert, hottest first", title=f"Co-activation, layer {layer}")


def _gpu_load(figure: Any, axis: Any, gpu_load: np.ndarray) -> None:
    share = gpu_load / np.maximum(gpu_load.mean(1, keepdims=True), 1e-9)
    image = axis.imshow(share, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=axis, label="load / mean GPU")
    busiest = share.max(1)[gpu_load.any(1)].mean() if gpu_load.any() else 0
    axis.set(xlabel="GPU", ylabel="layer", title=f"GPU load (busiest / mean: {busiest:.3f} over layers)")


def _fanout(axis: Any, picture: LayerPicture) -> None:
    assert picture.fanout is not None
    gpus = np.flatnonzero(picture.fanout)
    share = 100 * picture.fanout / max(int(picture.fanout.sum()), 1)
    bars = axis.bar(gpus, share[gpus], color="#2b6cb0")
    axis.bar_label(bars, fmt="%.0f %%")
    mean = float((np.arange(len(share)) * share).sum() / 100)
    axis.set(xlabel="GPUs that a token visits", ylabel="% of tokens",
             title=f"GPU fan-out, layer {picture.layer} (mean {mean:.2f})")  # fmt: skip
    axis.set_xticks(np.arange(gpus.min(initial=1), gpus.max(initial=1) + 1))
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def plot_map(expert_map: ExpertMap, topology: Topology | None, layer: int, path: Path) -> None:
    """Replicas of every expert by layer; with GPUs also which GPUs hold each expert, in one layer."""
    figure, axes = _figure(1 if topology is None else 2)
    axis = axes[0]
    image = axis.imshow(expert_map.replica_counts(), aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=axis, label="replicas")
    axis.set(xlabel="logical expert", ylabel="layer", title="Replicas")
    if topology is not None:
        _holdings(figure, axes[1], expert_map, topology, layer)
    _save(figure, path)


def _holdings(figure: Any, axis: Any, expert_map: ExpertMap, topology: Topology, layer: int) -> None:
    held = np.zeros((topology.num_gpus, expert_map.num_experts))
    per_gpu = topology.slots_per_gpu(expert_map.num_slots)
    np.add.at(held, (np.arange(expert_map.num_slots) // per_gpu, expert_map.physical_to_logical[layer]), 1)
    axis.imshow(held, aspect="auto", interpolation="nearest", cmap="Blues")
    for node in range(1, topology.num_nodes):
        axis.axhline(node * topology.gpus_per_node - 0.5, color="#c05621", linewidth=1)
    axis.set(xlabel="logical expert", ylabel="GPU (lines: nodes)", title=f"Experts of each GPU, layer {layer}")


def plot_comparison(rows: dict[str, tuple[float, float, float]], path: Path) -> None:
    """GPUs and nodes a token visits, and the busiest GPU over the mean, a bar for each placement."""
    figure, axes = _figure(3)
    figure.set_size_inches(11, 3.6)
    titles = ("GPUs a token visits", "nodes a token visits", "busiest GPU / mean load (1 is even)")
    colors = ["#8a94a0", "#c05621", "#2b6cb0"]
    for number, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        bars = axis.bar(list(rows), [values[number] for values in rows.values()], color=colors[: len(rows)], width=0.6)
        axis.bar_label(bars, fmt="%.2f")
        axis.set(title=title)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
