"""--ep-forced-routing in the server."""

from __future__ import annotations

import logging
from typing import Any

from sglang_eplb_affinity.device.forced_routing import FLAG, NOT_THE_MODELS, ForcedRouting
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.sglang_hooks.settings import Settings

logger = logging.getLogger(__name__)


def make(settings: Settings, device: Any, rank: int) -> ForcedRouting:
    """Raises InputError if the flag's value or its trace does not fit the model."""
    shape = settings.shape
    if shape is None or settings.forced_routing is None:
        raise InputError(f"{FLAG} {settings.forced_routing}: {settings.model_path} has no routed experts")
    return ForcedRouting.from_flag(
        settings.forced_routing,
        moe_layers=shape.moe_layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        topology=settings.topology,
        device=device,
        contiguous=not settings.eplb and not settings.redundant and not settings.loads_map,
        own_tokens=settings.own_tokens,
        rank=rank,
    )


def init(settings: Settings, rank: int) -> ForcedRouting:
    forced = make(settings, settings.device, rank)
    if rank == 0:
        logger.warning("[eplb-affinity] %s %s: %s", FLAG, settings.forced_routing, NOT_THE_MODELS)
    return forced
