"""Model folders: shards of bounded size with Hugging Face's index, so that no file of the repository is large."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.engines.tiny_moe.model import ModelConfig, TinyMoe

SHARD_BYTES = 2_000_000
MODEL_FOLDER = Path(__file__).parent / "model"
# A base model: the template only joins the messages.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def save(model: TinyMoe, folder: Path, tokenizer: Path) -> None:
    """bfloat16 safetensors in shards of at most SHARD_BYTES, config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, weight in model.hf_state().items():
        weight = weight.to(torch.bfloat16)
        if size + weight.nbytes > SHARD_BYTES - 100_000:  # the header takes some room
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
        total += weight.nbytes
    weight_map = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index_data = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_data, separators=(",", ":")) + "\n")
    (folder / "config.json").write_text(json.dumps(model.c.to_hf(), indent=1) + "\n")
    (folder / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 0, "do_sample": false}\n')
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": model.c.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1) + "\n")
    if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")


def load(folder: Path = MODEL_FOLDER) -> TinyMoe:
    """The model in float32, in evaluation mode."""
    model = TinyMoe(ModelConfig.from_hf(folder))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    state: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        state.update(load_file(folder / file))
    model.load_hf_state({name: weight.float() for name, weight in state.items()})
    return model.eval()
