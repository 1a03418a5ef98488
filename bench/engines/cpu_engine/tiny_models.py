"""Tiny MoE models with random weights, a tokenizer included; built in well under a second, nothing downloaded.

    python -m bench.engines.cpu_engine.tiny_models FOLDER [--dtype float32]

writes FOLDER/qwen3moe, FOLDER/dsv3 (DeepSeek-V3), FOLDER/glm4moe, FOLDER/qwen2moe and FOLDER/dense (Qwen3 without
experts). Routers are skewed, so that
EPLB has something to balance; what random routers do not have is affinity between experts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCABULARY = 512
HEAD_DIM, HEADS, KV_HEADS = 32, 4, 2
# DeepSeek's latent attention
NOPE_DIM, ROPE_DIM, V_DIM, KV_RANK, Q_RANK = 32, 16, 32, 64, 64


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a tiny model; ``experts`` routed experts of which each token takes ``top_k``."""

    layers: int = 4
    hidden: int = 128
    experts: int = 16
    top_k: int = 4
    expert_width: int = 64
    dense_width: int = 256


class Weights:
    """Named random tensors, reproducible."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._dtype = dtype
        self._random = torch.Generator().manual_seed(0)

    def normal(self, name: str, *shape: int, scale: float | torch.Tensor | None = None) -> None:
        values = torch.randn(*shape, generator=self._random) * (shape[-1] ** -0.5 if scale is None else scale)
        self.tensors[name] = values.to(self._dtype).contiguous()

    def ones(self, name: str, size: int) -> None:
        self.tensors[name] = torch.ones(size, dtype=self._dtype)

    def mlp(self, prefix: str, hidden: int, width: int) -> None:
        self.normal(f"{prefix}.gate_proj.weight", width, hidden)
        self.normal(f"{prefix}.up_proj.weight", width, hidden)
        self.normal(f"{prefix}.down_proj.weight", hidden, width)

    def router(self, name: str, shape: TinyShape) -> None:
        popularity = torch.linspace(2.0, 0.3, shape.experts)[:, None]
        self.normal(name, shape.experts, shape.hidden, scale=popularity * shape.hidden**-0.5)

    def embeddings(self, hidden: int) -> None:
        self.normal("model.embed_tokens.weight", VOCABULARY, hidden, scale=1.0)
        self.normal("lm_head.weight", VOCABULARY, hidden)
        self.ones("model.norm.weight", hidden)

    def layer_norms(self, prefix: str, hidden: int) -> None:
        self.ones(f"{prefix}.input_layernorm.weight", hidden)
        self.ones(f"{prefix}.post_attention_layernorm.weight", hidden)


def _common_config(shape: TinyShape, dtype: str) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.dense_width,
        "max_position_embeddings": 4096,
        "num_attention_heads": HEADS,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def _qwen3_attention(weights: Weights, prefix: str, hidden: int) -> None:
    weights.normal(f"{prefix}.q_proj.weight", HEADS * HEAD_DIM, hidden)
    weights.normal(f"{prefix}.k_proj.weight", KV_HEADS * HEAD_DIM, hidden)
    weights.normal(f"{prefix}.v_proj.weight", KV_HEADS * HEAD_DIM, hidden)
    weights.normal(f"{prefix}.o_proj.weight", hidden, HEADS * HEAD_DIM)
    weights.ones(f"{prefix}.q_norm.weight", HEAD_DIM)
    weights.ones(f"{prefix}.k_norm.weight", HEAD_DIM)


def qwen3(folder: Path, shape: TinyShape, dtype: str, *, moe: bool) -> None:
    """Qwen3Moe, or Qwen3 without experts."""
    config = _common_config(shape, dtype) | {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if moe else "qwen3",
        "head_dim": HEAD_DIM,
        "max_window_layers": shape.layers,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    if moe:
        config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": shape.expert_width,
            "norm_topk_prob": True,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
    weights = Weights(getattr(torch, dtype))
    weights.embeddings(shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        weights.layer_norms(prefix, shape.hidden)
        _qwen3_attention(weights, f"{prefix}.self_attn", shape.hidden)
        if not moe:
            weights.mlp(f"{prefix}.mlp", shape.hidden, shape.dense_width)
            continue
        weights.router(f"{prefix}.mlp.gate.weight", shape)
        for expert in range(shape.experts):
            weights.mlp(f"{prefix}.mlp.experts.{expert}", shape.hidden, shape.expert_width)
    _write(folder, config, weights)


def deepseek_v3(folder: Path, shape: TinyShape, dtype: str) -> None:
    """DeepSeek-V3: latent attention, one dense layer, grouped top-k with correction bias, one shared expert."""
    config = _common_config(shape, dtype) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": KV_RANK,
        "moe_intermediate_size": shape.expert_width,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": shape.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": shape.top_k,
        "num_key_value_heads": HEADS,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": Q_RANK,
        "qk_nope_head_dim": NOPE_DIM,
        "qk_rope_head_dim": ROPE_DIM,
        "rope_scaling": {
            "type": "yarn",
            "factor": 2,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 2048,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "v_head_dim": V_DIM,
    }
    weights = Weights(getattr(torch, dtype))
    weights.embeddings(shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        weights.layer_norms(prefix, shape.hidden)
        _latent_attention(weights, f"{prefix}.self_attn", shape.hidden)
        if layer < config["first_k_dense_replace"]:
            weights.mlp(f"{prefix}.mlp", shape.hidden, shape.dense_width)
            continue
        _moe_with_shared_expert(weights, f"{prefix}.mlp", shape)
    _write(folder, config, weights)


def glm4_moe(folder: Path, shape: TinyShape, dtype: str) -> None:
    """GLM-4-MoE: one dense layer, then grouped top-k with correction bias and one shared expert."""
    config = _common_config(shape, dtype) | {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "first_k_dense_replace": 1,
        "head_dim": HEAD_DIM,
        "moe_intermediate_size": shape.expert_width,
        "n_group": 1,
        "n_routed_experts": shape.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": shape.top_k,
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": True,
    }
    weights = Weights(getattr(torch, dtype))
    weights.embeddings(shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        weights.layer_norms(prefix, shape.hidden)
        _qwen3_attention(weights, f"{prefix}.self_attn", shape.hidden)
        if layer < config["first_k_dense_replace"]:
            weights.mlp(f"{prefix}.mlp", shape.hidden, shape.dense_width)
            continue
        _moe_with_shared_expert(weights, f"{prefix}.mlp", shape)
    _write(folder, config, weights)


def qwen2_moe(folder: Path, shape: TinyShape, dtype: str) -> None:
    """Qwen2Moe: biased attention; no shared expert, whose gate is a Triton kernel in SGLang."""
    config = _common_config(shape, dtype) | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 1,
        "max_window_layers": shape.layers,
        "mlp_only_layers": [],
        "moe_intermediate_size": shape.expert_width,
        "norm_topk_prob": False,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "output_router_logits": False,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 0,
        "sliding_window": None,
        "use_sliding_window": False,
    }
    weights = Weights(getattr(torch, dtype))
    weights.embeddings(shape.hidden)
    head = shape.hidden // HEADS
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        weights.layer_norms(prefix, shape.hidden)
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            weights.normal(f"{prefix}.self_attn.{name}.weight", heads * head, shape.hidden)
            weights.normal(f"{prefix}.self_attn.{name}.bias", heads * head)
        weights.normal(f"{prefix}.self_attn.o_proj.weight", shape.hidden, HEADS * head)
        weights.router(f"{prefix}.mlp.gate.weight", shape)
        for expert in range(shape.experts):
            weights.mlp(f"{prefix}.mlp.experts.{expert}", shape.hidden, shape.expert_width)
    _write(folder, config, weights)


def _moe_with_shared_expert(weights: Weights, prefix: str, shape: TinyShape) -> None:
    weights.router(f"{prefix}.gate.weight", shape)
    weights.tensors[f"{prefix}.gate.e_score_correction_bias"] = torch.linspace(0.3, 0, shape.experts)
    for expert in range(shape.experts):
        weights.mlp(f"{prefix}.experts.{expert}", shape.hidden, shape.expert_width)
    weights.mlp(f"{prefix}.shared_experts", shape.hidden, shape.expert_width)


def _latent_attention(weights: Weights, prefix: str, hidden: int) -> None:
    weights.normal(f"{prefix}.q_a_proj.weight", Q_RANK, hidden)
    weights.ones(f"{prefix}.q_a_layernorm.weight", Q_RANK)
    weights.normal(f"{prefix}.q_b_proj.weight", HEADS * (NOPE_DIM + ROPE_DIM), Q_RANK)
    weights.normal(f"{prefix}.kv_a_proj_with_mqa.weight", KV_RANK + ROPE_DIM, hidden)
    weights.ones(f"{prefix}.kv_a_layernorm.weight", KV_RANK)
    weights.normal(f"{prefix}.kv_b_proj.weight", HEADS * (NOPE_DIM + V_DIM), KV_RANK)
    weights.normal(f"{prefix}.o_proj.weight", hidden, HEADS * V_DIM)


def _write(folder: Path, config: dict[str, Any], weights: Weights) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights.tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog. expert parallel load balancing in mixture of experts models "
    tokenizer.train_from_iterator(
        [text + "one two three four five six seven eight nine ten hello world " * 20], trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = (
        "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "chat_template": chat,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def build(folder: Path, dtype: str = "float32", shape: TinyShape = TinyShape()) -> None:
    qwen3(folder / "qwen3moe", shape, dtype, moe=True)
    qwen3(folder / "dense", shape, dtype, moe=False)
    deepseek_v3(folder / "dsv3", shape, dtype)
    glm4_moe(folder / "glm4moe", shape, dtype)
    qwen2_moe(folder / "qwen2moe", shape, dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m bench.engines.cpu_engine.tiny_models", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    build(options.folder, options.dtype)
