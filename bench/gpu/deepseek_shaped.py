"""A DeepSeek-V3-shaped model without weights: its layers' sizes, FP8 blocks, as many layers as fit; for throughput.

    python -m bench.gpu.deepseek_shaped FOLDER --moe-layers 4

To be served with `--load-format dummy`. Each token is a word of its own (see random_moe).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.random_moe import write_tokenizer


@dataclass(frozen=True)
class DeepseekSizes:
    """DeepSeek-V3's, but for the number of layers and the vocabulary. 11.3 GB of experts per MoE layer."""

    moe_layers: int = 4
    dense_layers: int = 1
    hidden: int = 7168
    experts: int = 256
    top_k: int = 8
    expert_width: int = 2048
    vocabulary: int = 4096


def config_of(sizes: DeepseekSizes) -> dict[str, object]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "ep_size": 1,
        "first_k_dense_replace": sizes.dense_layers,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": sizes.expert_width,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": sizes.top_k,
        "num_hidden_layers": sizes.dense_layers + sizes.moe_layers,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": sizes.vocabulary,
    }


def write_config(folder: Path, sizes: DeepseekSizes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(sizes), indent=1))
    write_tokenizer(folder, sizes.vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.deepseek_shaped", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    for name in DeepseekSizes.__annotations__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(DeepseekSizes, name))
    options = vars(parser.parse_args())
    folder = options.pop("folder")
    write_config(folder, DeepseekSizes(**options))


if __name__ == "__main__":
    main()
