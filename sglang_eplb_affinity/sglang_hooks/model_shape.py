"""The MoE layers of the served model, from its Hugging Face configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_NUM_EXPERTS_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class MoeShape:
    """Of the served model. ``num_layers`` counts dense layers too, as SGLang's maps do; ``moe_layers`` are those with
    routed experts. ``zero_experts``: behind the experts, which the router may choose and which have no weights."""

    num_layers: int
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    zero_experts: int = 0

    @staticmethod
    def of(hf_config: Any) -> MoeShape | None:
        """From a Hugging Face configuration; None for a model without routed experts."""
        experts = _first_int(hf_config, _NUM_EXPERTS_KEYS)
        top_k = _first_int(hf_config, _TOP_K_KEYS)
        layers = _first_int(hf_config, ("num_hidden_layers", "num_layers"))
        if not experts or experts < 2 or not top_k or not layers:
            return None
        moe_layers = tuple(layer for layer in range(layers) if _is_moe(hf_config, layer))
        return MoeShape(layers, experts, top_k, moe_layers, _first_int(hf_config, ("zero_expert_num",)) or 0)


def _is_moe(hf_config: Any, layer: int) -> bool:
    """DeepSeek: dense layers first, then every moe_layer_freq-th; Qwen: every decoder_sparse_step-th but the listed;
    Step: those in moe_layers_enum."""
    listed = getattr(hf_config, "moe_layers_enum", None)
    if listed is not None:
        names = listed.split(",") if isinstance(listed, str) else listed
        return layer in {int(name) for name in names if str(name).strip()}
    frequency = getattr(hf_config, "moe_layer_freq", 1)
    sparse = frequency[layer] if isinstance(frequency, list) else layer % max(frequency or 1, 1) == 0
    step = getattr(hf_config, "decoder_sparse_step", 1) or 1
    return bool(
        sparse
        and layer >= (getattr(hf_config, "first_k_dense_replace", 0) or 0)
        and (layer + 1) % step == 0
        and layer not in (getattr(hf_config, "mlp_only_layers", None) or ())
    )


def _first_int(config: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
