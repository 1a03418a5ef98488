"""Which ranks SGLang's elastic EP names as gone, and the map in force as the others have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.living_ranks import LivingRanks
from sglang_eplb_affinity.sglang_hooks.location import map_of

# Hung onto SGLang's metadata: the ranks that its tables leave out.
_LEFT_OUT = "eplb_affinity_left_out"


def living_ranks(topology: Topology) -> LivingRanks | None:
    """None while every rank lives, and without elastic EP.

    By the copy that SGLang takes when it sees a fault, as its weight update goes by: the mask on the device may change
    at any time.
    """
    from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager

    state = ElasticEPStateManager.instance()
    if state is None or state.active_ranks_cpu is None:
        return None
    alive = state.active_ranks_cpu[: topology.num_gpus].numpy() > 0
    return None if alive.all() else LivingRanks(alive, topology)


@dataclass(frozen=True)
class MapInForce:
    """``expert_map``: over the slots of living ranks, with every expert in it. ``may_stay``: SGLang's tables name no
    slot of a rank that is gone, so that a round may leave them as they are."""

    expert_map: ExpertMap
    may_stay: bool


def map_in_force(metadata: Any, living: LivingRanks | None, counts: np.ndarray) -> MapInForce:
    """Of SGLang's metadata; raises InputError where the living have too few slots. counts int64 [layers, experts]."""
    if living is None:
        return MapInForce(map_of(metadata), True)
    whole = metadata.physical_to_logical_map_cpu.numpy().astype(np.int32)
    return MapInForce(living.repaired(whole, counts), getattr(metadata, _LEFT_OUT, ()) == living.gone)


def leaves_out(metadata: Any, living: LivingRanks | None) -> None:
    """SGLang is about to put tables for ``living`` into ``metadata``, the object in force."""
    setattr(metadata, _LEFT_OUT, () if living is None else living.gone)
