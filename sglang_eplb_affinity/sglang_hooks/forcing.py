"""--ep-forced-routing in the server."""

from __future__ import annotations

import logging
from typing import Any

from sglang_eplb_affinity.device.forced_routing import FLAG, NOT_THE_MODELS, ForcedRouting
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape

logger = logging.getLogger(__name__)


def make(server_args: Any, ep_size: int, all_to_all: str, device: Any, rank: int) -> ForcedRouting:
    """Raises InputError if the flag's value or its trace does not fit the model."""
    shape = MoeShape.of(server_args.get_model_config().hf_text_config)
    if shape is None:
        raise InputError(f"{FLAG} {server_args.ep_forced_routing}: {server_args.model_path} has no routed experts")
    return ForcedRouting.from_flag(
        server_args.ep_forced_routing,
        moe_layers=shape.moe_layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        topology=Topology(ep_size, server_args.eplb_affinity_nodes or server_args.nnodes),
        device=device,
        contiguous=not server_args.enable_eplb
        and not server_args.ep_num_redundant_experts
        and server_args.init_expert_location == "trivial",
        own_tokens=all_to_all != "none",
        rank=rank,
    )


def init(server_args: Any, rank: int) -> ForcedRouting:
    forced = make(server_args, server_args.ep_size, server_args.moe_a2a_backend, server_args.device, rank)
    if rank == 0:
        logger.warning("[eplb-affinity] %s %s: %s", FLAG, server_args.ep_forced_routing, NOT_THE_MODELS)
    return forced
