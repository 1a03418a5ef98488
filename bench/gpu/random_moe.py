"""A Qwen3Moe checkpoint of any size with random weights, written as safetensors; for throughput, not for text.

    python -m bench.gpu.random_moe FOLDER --layers 6 --hidden 2048

With ``--config-only`` no weights are written, for `--load-format dummy`, which is enough where only time counts: it
gives each rank other weights. Each token is a word of its own: a load generator takes the time of a token when it sees
its text, and of random tokens of a real vocabulary one in sixteen has none (half a character, a special token).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from sglang_eplb_affinity.domain.files import write_atomically

TOKENIZER = (
    Path(__file__).resolve().parents[1] / "engines" / "tiny_moe" / "model"
)  # the small trained model's, 4096 tokens


@dataclass(frozen=True)
class MoeSizes:
    layers: int = 6
    hidden: int = 2048
    experts: int = 64
    top_k: int = 8
    expert_width: int = 1024
    heads: int = 16
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 4096
    context: int = 32768


def config_of(sizes: MoeSizes) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "decoder_sparse_step": 1,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": 4 * sizes.hidden,
        "max_position_embeddings": sizes.context,
        "max_window_layers": sizes.layers,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes.expert_width,
        "norm_topk_prob": True,
        "num_attention_heads": sizes.heads,
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.top_k,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": sizes.vocabulary,
    }


def write_config(folder: Path, sizes: MoeSizes) -> None:
    """Configuration and tokenizer without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(sizes), indent=1))
    write_tokenizer(folder, sizes.vocabulary)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """``vocabulary`` tokens, each of which decodes to a word: w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{token}": token for token in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    write_atomically(folder / "tokenizer.json", tokenizer.to_str().encode())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=1).encode())


def build(folder: Path, sizes: MoeSizes, device: str) -> None:
    """Write the checkpoint, one file a layer; nothing is done if it is there already."""
    if (folder / "model.safetensors.index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=random, device=device, dtype=torch.bfloat16)
        return (values * shape[-1] ** -0.5).cpu()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    weight_map: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, str(folder / name), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    hidden, width = sizes.hidden, sizes.expert_width
    write(
        "model-base.safetensors",
        {
            "model.embed_tokens.weight": normal(sizes.vocabulary, hidden),
            "lm_head.weight": normal(sizes.vocabulary, hidden),
            "model.norm.weight": ones(hidden),
        },
    )
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.input_layernorm.weight": ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": ones(hidden),
            f"{prefix}.self_attn.q_proj.weight": normal(sizes.heads * sizes.head_dim, hidden),
            f"{prefix}.self_attn.k_proj.weight": normal(sizes.kv_heads * sizes.head_dim, hidden),
            f"{prefix}.self_attn.v_proj.weight": normal(sizes.kv_heads * sizes.head_dim, hidden),
            f"{prefix}.self_attn.o_proj.weight": normal(hidden, sizes.heads * sizes.head_dim),
            f"{prefix}.self_attn.q_norm.weight": ones(sizes.head_dim),
            f"{prefix}.self_attn.k_norm.weight": ones(sizes.head_dim),
            f"{prefix}.mlp.gate.weight": normal(sizes.experts, hidden),
        }
        for expert in range(sizes.experts):
            of_expert = f"{prefix}.mlp.experts.{expert}"
            tensors[f"{of_expert}.gate_proj.weight"] = normal(width, hidden)
            tensors[f"{of_expert}.up_proj.weight"] = normal(width, hidden)
            tensors[f"{of_expert}.down_proj.weight"] = normal(hidden, width)
        write(f"model-layer-{layer:03}.safetensors", tensors)
    write_config(folder, sizes)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.random_moe", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name, kind in MoeSizes.__annotations__.items():
        assert kind == "int"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(MoeSizes, name))
    parser.add_argument("--config-only", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = vars(parser.parse_args())
    folder, device = options.pop("folder"), options.pop("device")
    if options.pop("config_only"):
        write_config(folder, MoeSizes(**options))
    else:
        build(folder, MoeSizes(**options), device)


if __name__ == "__main__":
    main()
