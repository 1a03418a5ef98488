"""What the map in force was planned to give, what it gave on the window after, and what other maps would have given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_eplb_affinity.planner.layer_figures import FIGURES, LayerFigures

OF_MAP = ("promised", "delivered", "previous_map", "best_map")


@dataclass(frozen=True)
class Delivery:
    """Of one round, on rank 0.

    ``delivered``: the map in force, on the window that was recorded under it. ``promised``: the same map on the window
    that it was planned on (or kept on, by the round before). ``previous_map``, ``best_map``: the map before the last
    change, and of each layer the best one that it has had, on the same tokens as ``delivered``. ``regret`` float64
    [layers]: by what fraction the map in force costs, or loads its most loaded GPU, more than the best one; 0 where it
    is no worse, nan without traffic. ``returned``: layers that this round takes back to their best map.
    """

    delivered: LayerFigures
    regret: np.ndarray
    promised: LayerFigures | None = None
    previous_map: LayerFigures | None = None
    best_map: LayerFigures | None = None
    returned: tuple[int, ...] = ()

    def figures(self) -> Iterator[tuple[str, LayerFigures]]:
        """(name of OF_MAP, its figures), of those that there are."""
        for name in OF_MAP:
            found = getattr(self, name)
            if found is not None:
                yield name, found

    @property
    def mean_regret(self) -> float:
        known = self.regret[np.isfinite(self.regret)]
        return float(known.mean()) if len(known) else 0.0

    def to_json(self) -> dict[str, Any]:
        """Keys of the log line: ``MAP_FIGURE`` as means over layers, ``regret``, and by layer what is above 0."""
        line: dict[str, Any] = {}
        for name, figures in self.figures():
            line |= {f"{name}_{figure}": round(value, 4) for figure, value in figures.means().items()}
        line["regret"] = round(self.mean_regret, 4)
        line["regret_by_layer"] = {
            str(layer): round(float(self.regret[layer]), 4) for layer in np.flatnonzero(self.regret > 0)
        }
        line["returned_layers"] = list(self.returned)
        return line


METRIC_NAMES = tuple(f"{name}_{figure}" for name in OF_MAP for figure in FIGURES)
