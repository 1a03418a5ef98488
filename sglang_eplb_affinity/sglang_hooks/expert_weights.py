"""The model's expert weights, once they are loaded: as many slots as the map has, and every tensor that has to move."""

from __future__ import annotations

from typing import Any

from sglang_eplb_affinity.rebalance.expert_tensors import check_slots, expert_modules, provide_weights
from sglang_eplb_affinity.sglang_hooks.server_arguments import ServerArguments


def check(model_runner: Any, args: ServerArguments) -> None:
    """In every rank. Raises InputError where the map in force could not be served, or weights could not be moved."""
    if not (args.enable_eplb or args.init_expert_location != "trivial"):
        return
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    modules = expert_modules(model_runner.model)
    check_slots(
        model_runner.model,
        modules,
        metadata.num_physical_experts // metadata.ep_size,
        args.ep_num_redundant_experts,
    )
    if args.enable_eplb:
        provide_weights(model_runner.model, modules)


def expert_bytes(weights_of_layer: Any) -> dict[int, int]:
    """Bytes of one expert's weights by layer; ``weights_of_layer`` is SGLang's {layer: [tensor [local slots, ...]]}."""
    return {
        layer: sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
        for layer, tensors in weights_of_layer.items()
    }
