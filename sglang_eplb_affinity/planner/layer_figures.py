"""One map on one window, layer by layer, as the planner judges it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from sglang_eplb_affinity.dispatch.evaluate import over_layers
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.judge import Judgement, judge


@dataclass(frozen=True)
class LayerFigures:
    """float64 [layers] each, nan for a layer without traffic; the fields are those of :class:`Judgement`."""

    load: np.ndarray
    gpu_fanout: np.ndarray
    node_fanout: np.ndarray
    cost: np.ndarray

    @staticmethod
    def of(
        window: RoutingWindow,
        rows: np.ndarray,
        topology: Topology,
        config: PlannerConfig,
        layers: np.ndarray | None = None,
    ) -> LayerFigures | None:
        """The map ``rows`` int32 [layers, slots] on the window's counts and sample; None without a token sample.

        ``layers`` bool [layers]: of these only, nan for the others.
        """
        if window.tokens is None:
            return None
        judged = over_layers(
            lambda layer: (
                judge_layer(window, layer, rows[layer], topology, config) if layers is None or layers[layer] else None
            ),
            window.num_layers,
            config.resolved_threads(),
        )
        return LayerFigures(
            *(np.array([np.nan if found is None else getattr(found, name) for found in judged]) for name in FIGURES)
        )

    def only(self, layers: np.ndarray) -> LayerFigures:
        """nan but for ``layers`` bool [layers]."""
        return LayerFigures(*(np.where(layers, getattr(self, name), np.nan) for name in FIGURES))

    def with_layers(self, other: LayerFigures | None, layers: np.ndarray) -> LayerFigures:
        """``other`` for ``layers`` bool [layers], these figures for the rest."""
        if other is None:
            return self
        return LayerFigures(*(np.where(layers, getattr(other, name), getattr(self, name)) for name in FIGURES))

    def to_json(self) -> dict[str, list[float | None]]:
        """By figure, a value for each layer; None for nan, which JSON lacks."""
        return {name: [round(float(v), 6) if np.isfinite(v) else None for v in getattr(self, name)] for name in FIGURES}

    @staticmethod
    def of_json(data: dict[str, list[float | None]] | None, layers: int) -> LayerFigures | None:
        """Raises ValueError, KeyError or TypeError for what :meth:`to_json` does not write for so many layers."""
        if data is None:
            return None
        arrays = [np.array([np.nan if v is None else float(v) for v in data[name]]) for name in FIGURES]
        for name, values in zip(FIGURES, arrays, strict=True):
            if values.shape != (layers,):
                raise ValueError(f"{name} has {len(values)} values, but the map has {layers} layers")
        return LayerFigures(*arrays)

    def means(self) -> dict[str, float]:
        """Over layers with traffic; empty where there is none."""
        if not np.isfinite(self.load).any():
            return {}
        return {name: float(np.nanmean(getattr(self, name))) for name in FIGURES}


FIGURES = tuple(field.name for field in fields(LayerFigures))


def judge_layer(
    window: RoutingWindow, layer: int, row: np.ndarray, topology: Topology, config: PlannerConfig
) -> Judgement | None:
    """``row`` int32 [slots] on the whole sample of one layer; None without traffic or sampled tokens."""
    tokens = sampled(window, layer)
    if not window.counts[layer].any() or not len(tokens):
        return None
    return judge(row, window.counts[layer], tokens, topology, config)


def sampled(window: RoutingWindow, layer: int) -> np.ndarray:
    """int16 [T, k]: the sampled tokens of one layer, in the window's order."""
    assert window.tokens is not None
    tokens = window.tokens[layer]
    return np.ascontiguousarray(tokens[(tokens >= 0).any(1)], dtype=np.int16)
