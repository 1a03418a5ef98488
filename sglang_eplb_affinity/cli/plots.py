"""Pictures for ``inspect`` (matplotlib, without a display)."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.routing import RoutingWindow


def _figure(columns: int):  # type: ignore[no-untyped-def]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs the package matplotlib, which is not installed") from None
    figure = Figure(figsize=(6.5 * columns, 4.8), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure, path: Path) -> None:  # type: ignore[no-untyped-def]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def plot_trace(window: RoutingWindow, num_tokens: int, layer: int, path: Path) -> None:
    """Left: load of every expert by layer. Right: one layer's co-activation lift, experts ordered by load."""
    figure, (left, right) = _figure(2)
    share = window.counts / window.counts.mean(1, keepdims=True)
    image = left.imshow(share, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=left, label="load / mean expert")
    left.set(xlabel="logical expert", ylabel="layer", title="Expert load")
    assert window.coactivation is not None
    counts = np.maximum(window.counts[layer], 1)
    lift = window.coactivation[layer] * num_tokens / (counts[:, None] * counts[None, :])
    order = np.argsort(-counts, kind="stable")
    image = right.imshow(np.log2(np.maximum(lift[order][:, order], 1 / 16)), cmap="RdBu_r", vmin=-4, vmax=4)
    figure.colorbar(image, ax=right, label="log2 lift (0: independent)")
    right.set(xlabel="expert, hottest first", ylabel="expert, hottest first", title=f"Co-activation, layer {layer}")
    _save(figure, path)


def plot_map(expert_map: ExpertMap, path: Path) -> None:
    """Replicas of every expert by layer."""
    figure, (axis,) = _figure(1)
    image = axis.imshow(expert_map.replica_counts(), aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=axis, label="replicas")
    axis.set(xlabel="logical expert", ylabel="layer", title="Replicas")
    _save(figure, path)


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
