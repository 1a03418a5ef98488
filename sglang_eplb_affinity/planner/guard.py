"""The load guard: a map that traffic has drifted away from gives way to EPLB's, layer by layer.

An affinity map puts experts that fire together on one GPU. When the traffic changes topic they rise together, and the
most loaded GPU can be loaded more than under EPLB's map of the same plan. The guard compares both maps on what was
recorded since, under the rule that the server uses, and keeps EPLB's layer wherever the affinity layer is loaded more.
"""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.layer_figures import LayerFigures


def drifted_layers(
    window: RoutingWindow, topology: Topology, affinity: ExpertMap, eplb: ExpertMap, config: PlannerConfig
) -> np.ndarray:
    """bool [layers]: where ``affinity`` loads its most loaded GPU more than ``eplb`` by over ``max_load_increase``.

    ``window`` is what was recorded since the plan, with a token sample. Layers without traffic are not drifted.
    """
    ours, theirs = (LayerFigures.of(window, m.physical_to_logical, topology, config) for m in (affinity, eplb))
    if ours is None or theirs is None:
        raise InputError("load guard: the routing window has no token sample")
    return np.asarray(ours.load > theirs.load * (1 + config.max_load_increase))


def guarded_map(affinity: ExpertMap, eplb: ExpertMap, drifted: np.ndarray) -> ExpertMap:
    """``affinity`` with EPLB's layers where ``drifted`` bool [layers]."""
    rows = np.where(drifted[:, None], eplb.physical_to_logical, affinity.physical_to_logical)
    return ExpertMap(rows, affinity.num_experts)
