"""Weights of a draft model's experts after the target's moved, by every way in which a server takes new weights.

Runs in a Python with patched SGLang, with its own expert layers and weight updater; see test_objects.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

EXPERTS, REDUNDANT, RANKS, WIDTH = 4, 2, 2, 8
# Of the target: each rank has other experts than in the order of the checkpoint.
MOVED = [[3, 2, 1, 0, 3, 2]]


class Model(nn.Module):
    """One layer of experts, loaded as SGLang's model classes do."""

    def __init__(self) -> None:
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

        super().__init__()
        self.experts = FusedMoE(
            num_experts=EXPERTS + REDUNDANT, top_k=1, hidden_size=WIDTH, intermediate_size=WIDTH, layer_id=0
        )

    def load_weights(self, weights: Any) -> None:
        shards = {"gate_proj": ("w13_weight", "w1"), "up_proj": ("w13_weight", "w3"), "down_proj": ("w2_weight", "w2")}
        for name, tensor in weights:
            expert, projection = name.split(".")[1:3]
            parameter, shard = shards[projection]
            target = getattr(self.experts, parameter)
            target.weight_loader(target, tensor, f"experts.{parameter}", shard, int(expert))

    def experts_held(self) -> list[int]:
        """Which expert's weights each local slot has; every weight of expert e is e + 1."""
        return [int(value) - 1 for value in self.experts.w2_weight[:, 0, 0].tolist()]


def checkpoint() -> dict[str, torch.Tensor]:
    return {
        f"experts.{expert}.{projection}.weight": torch.full((WIDTH, WIDTH), float(expert + 1))
        for expert in range(EXPERTS)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }


def update(model: Model, way: str) -> tuple[bool, str]:
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    updater = WeightUpdater(
        tp_rank=0,
        device="cpu",
        gpu_id=0,
        model_config=SimpleNamespace(
            model_path="", revision=None, dtype=torch.float32, quantization=None, hf_config=SimpleNamespace()
        ),
        custom_weight_loaders={},
        get_model=lambda: model,
        update_model_fields=lambda *args, **kwargs: None,
        recapture_cuda_graph=lambda: None,
        get_model_runner=lambda: SimpleNamespace(eplb_manager=None),
    )
    if way == "disk":
        with tempfile.TemporaryDirectory() as folder:
            save_file(checkpoint(), Path(folder) / "model.safetensors")
            return updater.update_weights_from_disk(folder, "auto")
    named = list(checkpoint().items())
    if way == "tensor":
        return updater.update_weights_from_tensor(named)
    return updater.load_weights_from_distributed(named)


def findings() -> dict[str, Any]:
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata, set_global_expert_location_metadata
    from sglang.srt.layers.moe.utils import draft_model_build_scope
    from sglang.srt.runtime_context import get_context, get_parallel

    sizes = {"tp_size": RANKS, "moe_ep_size": RANKS, "moe_tp_size": 1, "moe_dp_size": 1}
    ranks = {"tp_rank": 1, "moe_ep_rank": 1, "moe_tp_rank": 0}
    found: dict[str, Any] = {}
    flags = {"device": "cpu", "tp_size": RANKS, "ep_size": RANKS, "ep_num_redundant_experts": REDUNDANT}
    with get_context().override_server_args(**flags), get_parallel().override(**sizes, **ranks):
        slots = torch.tensor(MOVED)
        replicas = [[[i for i, e in enumerate(MOVED[0]) if e == expert] for expert in range(EXPERTS)]]
        padded = torch.tensor([[row + [-1] * (len(MOVED[0]) - len(row)) for row in layer] for layer in replicas])
        number = (padded >= 0).sum(-1)
        metadata = ExpertLocationMetadata(slots, slots, padded, padded, number, RANKS, None)
        set_global_expert_location_metadata(metadata, allow_overwrite=True)
        for name in ("target", "draft"):
            for way in ("disk", "tensor", "distributed"):
                torch.manual_seed(0)
                if name == "draft":
                    with draft_model_build_scope():
                        model = Model()
                else:
                    model = Model()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.zero_()
                done, message = update(model, way)
                assert done, message
                found[f"{name} {way}"] = model.experts_held()
    return found
