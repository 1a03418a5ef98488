"""Which layers of a round go back to their best map in place of the plan's."""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.survival import Survive, survives_better
from sglang_eplb_affinity.rebalance.map_history import Comparison, reason_of, with_returned


def with_best_maps(
    placed: ExpertMap, current: ExpertMap, comparison: Comparison, counts: np.ndarray, topology: Topology,
    survive: Survive, most_moves: int | None,
) -> tuple[ExpertMap, Comparison, str | None]:  # fmt: skip
    """(``placed`` with the best map of the layers that go back, the comparison with those layers, why they do).

    Evidence of tokens that a map was not planned on goes before a plan's promise, so the plan of a layer that goes back
    is dropped; the next round plans from the best map. A layer stays if going back changes more than ``most_moves``
    slots of a GPU, or if more traffic than under its plan would be lost with what it is to ``survive``; counts int64
    [layers, experts]. A plan that is the map which the layer went back from not long ago is dropped too.
    """
    rows, in_force = placed.physical_to_logical.copy(), current.physical_to_logical
    held = comparison.held(rows)
    rows[held] = in_force[held]
    moves = (comparison.best != in_force).reshape(len(rows), topology.num_gpus, -1).sum(2).max(1)
    back = comparison.back & (moves <= (np.inf if most_moves is None else most_moves))
    for layer in np.flatnonzero(back):
        back[layer] = not survives_better(rows[layer], comparison.best[layer], counts[layer], topology, survive)
    rows[back] = comparison.best[back]
    returned = np.flatnonzero(back).tolist()
    return ExpertMap(rows, placed.num_experts), with_returned(comparison, returned), reason_of(comparison, returned)
