"""Qwen3Moe in plain PyTorch: the architecture that Hugging Face and SGLang load as Qwen3MoeForCausalLM.

Every expert is computed for every token and the router's weights (zero for experts not chosen) are applied before the
down projection. At 64 experts of 32 hidden units that is one dense product, exact and without sorting.
tests/bench/tiny_moe checks the logits against transformers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 4096
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 32
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    router_aux_loss_coef: float = 0.001

    def to_hf(self) -> dict[str, Any]:
        """config.json of Hugging Face's Qwen3MoeForCausalLM."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **asdict(self),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "decoder_sparse_step": 1,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "intermediate_size": 4 * self.hidden_size,
            "max_window_layers": self.num_hidden_layers,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "output_router_logits": False,
            "rope_scaling": None,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
        }

    @staticmethod
    def from_hf(path: Path) -> ModelConfig:
        data = json.loads((path / "config.json").read_text())
        return ModelConfig(**{name: data[name] for name in asdict(ModelConfig())})


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


def rope_tables(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [positions, head_dim], in the half-rotated layout of Llama and Qwen."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.arange(positions).float()[:, None] * inverse
    return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps), RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, s, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, s, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, s, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        repeat = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, s, -1))


class SparseMoe(nn.Module):
    """``gate_up`` [2, experts, intermediate, hidden]; ``down`` [experts, hidden, intermediate]."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.gate = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(2, c.num_experts, c.moe_intermediate_size, c.hidden_size))
        self.down = nn.Parameter(torch.empty(c.num_experts, c.hidden_size, c.moe_intermediate_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [tokens, hidden] -> output, balancing loss (scalar), top-k ids int64 [tokens, k]."""
        c = self.c
        scores = self.gate(x).float().softmax(-1)
        weights, ids = scores.topk(c.num_experts_per_tok, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        dense = torch.zeros_like(scores).scatter(-1, ids, weights).to(x.dtype)
        used = torch.zeros_like(scores).scatter(-1, ids, 1.0)
        # Switch Transformer's loss as in transformers: experts * sum(share of tokens * mean probability); k if even.
        loss = c.num_experts * (used.mean(0) * scores.mean(0)).sum()
        hidden = F.linear(x, self.gate_up.reshape(-1, c.hidden_size).to(x.dtype)).view(len(x), 2, c.num_experts, -1)
        act = F.silu(hidden[:, 0]) * hidden[:, 1] * dense[:, :, None]
        down = self.down.transpose(1, 2).reshape(-1, c.hidden_size).to(x.dtype)
        return act.reshape(len(x), -1) @ down, loss, ids


class Block(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = SparseMoe(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out, loss, ids = self.mlp(self.post_attention_layernorm(x).flatten(0, 1))
        return x + out.view_as(x), loss, ids.view(*x.shape[:2], -1)


class TinyMoe(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        cos, sin = rope_tables(c.max_position_embeddings, c.head_dim, c.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def initialize(self, seed: int = 0) -> None:
        """Normal, 0.02 for the embedding and fan-in**-0.5 elsewhere; what ends a block is scaled by depth (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * self.c.num_hidden_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                continue
            std = 0.02 if "embed_tokens" in name else weight.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "mlp.down")):
                std *= depth
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids int64 [batch, positions] -> logits [.., vocab], balancing loss, ids [layers, batch, positions, k]."""
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]  # type: ignore[index]
        losses, routing = [], []
        for layer in self.layers:
            x, loss, chosen = layer(x, cos, sin)
            losses.append(loss)
            routing.append(chosen)
        return self.lm_head(self.norm(x)), torch.stack(losses).mean(), torch.stack(routing)

    def hf_state(self) -> dict[str, Tensor]:
        """Weights under Hugging Face's names, one tensor per expert and projection."""
        out: dict[str, Tensor] = {}
        for name, weight in self.state_dict().items():
            name = name if name.startswith("lm_head") else f"model.{name}"
            if name.endswith("mlp.gate_up"):
                for expert in range(weight.shape[1]):
                    for index, projection in enumerate(("gate_proj", "up_proj")):
                        out[name.replace("gate_up", f"experts.{expert}.{projection}.weight")] = weight[index, expert]
            elif name.endswith("mlp.down"):
                for expert in range(weight.shape[0]):
                    out[name.replace("mlp.down", f"mlp.experts.{expert}.down_proj.weight")] = weight[expert]
            else:
                out[name] = weight
        return {name: weight.detach().cpu().contiguous() for name, weight in out.items()}

    def load_hf_state(self, state: dict[str, Tensor]) -> None:
        own: dict[str, Tensor] = {}
        for name in self.state_dict():
            hf = name if name.startswith("lm_head") else f"model.{name}"
            if name.endswith("mlp.gate_up"):
                own[name] = torch.stack(
                    [
                        torch.stack(
                            [
                                state[hf.replace("gate_up", f"experts.{e}.{projection}.weight")]
                                for e in range(self.c.num_experts)
                            ]
                        )
                        for projection in ("gate_proj", "up_proj")
                    ]
                )
            elif name.endswith("mlp.down"):
                experts = range(self.c.num_experts)
                own[name] = torch.stack(
                    [state[hf.replace("mlp.down", f"mlp.experts.{e}.down_proj.weight")] for e in experts]
                )
            else:
                own[name] = state[hf]
        self.load_state_dict(own)
