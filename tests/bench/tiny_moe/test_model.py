"""The model is Qwen3Moe: same logits as transformers, and its mixture is what the formula says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from bench.engines.tiny_moe import checkpoint  # noqa: E402
from bench.engines.tiny_moe.model import ModelConfig, SparseMoe, TinyMoe  # noqa: E402

SMALL = replace(
    ModelConfig(),
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=8,
    head_dim=8,
    max_position_embeddings=64,
)


def small_model(seed: int = 0) -> TinyMoe:
    model = TinyMoe(SMALL)
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() == 1:  # norms of one would hide a norm in the wrong place
            weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def test_mixture_is_the_weighted_sum_of_the_chosen_experts() -> None:
    moe: SparseMoe = small_model().layers[0].mlp
    x = torch.randn(20, SMALL.hidden_size, generator=torch.Generator().manual_seed(1))
    out, _, ids = moe(x)
    scores = (x @ moe.gate.weight.T).softmax(-1)
    for token in range(len(x)):
        chosen = sorted(range(SMALL.num_experts), key=lambda e: -scores[token, e].item())[: SMALL.num_experts_per_tok]
        assert ids[token].tolist() == chosen
        total = sum(scores[token, e] for e in chosen)
        want = torch.zeros(SMALL.hidden_size)
        for e in chosen:
            gate, up = moe.gate_up[0, e] @ x[token], moe.gate_up[1, e] @ x[token]
            want += scores[token, e] / total * (moe.down[e] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(out[token], want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_balancing_loss_is_k_when_even_and_larger_when_one_expert_takes_all() -> None:
    moe: SparseMoe = small_model().layers[0].mlp
    x = torch.eye(SMALL.hidden_size)[: SMALL.num_experts].repeat(4, 1)
    moe.gate.weight.zero_()
    for e in range(SMALL.num_experts):  # token i prefers experts i, i+1, i+2: every expert equally often
        for rank in range(SMALL.num_experts_per_tok):
            moe.gate.weight[(e + rank) % SMALL.num_experts, e] = 9.0 - rank
    assert moe(x)[1].item() == pytest.approx(SMALL.num_experts_per_tok, rel=1e-5)
    moe.gate.weight[:] = torch.linspace(5, 0, SMALL.num_experts)[:, None]
    assert moe(x)[1].item() > 1.5 * SMALL.num_experts_per_tok


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_ones() -> None:
    model = small_model()
    ids = torch.randint(0, SMALL.vocab_size, (1, 30), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(ids)[0][:, :20], model(ids[:, :20])[0], rtol=1e-4, atol=1e-5)


def test_saved_model_loads_in_our_code_and_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 110_000)
    model = small_model()
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    checkpoint.save(model, tmp_path / "model", tokenizer)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    assert max(shard.stat().st_size for shard in shards) <= 110_000
    ours = checkpoint.load(tmp_path / "model")
    for name, weight in model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight.bfloat16().float()), name
    theirs = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = torch.randint(0, SMALL.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_committed_model_equals_transformers_and_predicts_text() -> None:
    transformers = pytest.importorskip("transformers")
    ours = checkpoint.load()
    theirs = transformers.Qwen3MoeForCausalLM.from_pretrained(checkpoint.MODEL_FOLDER, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.MODEL_FOLDER)
    text = "Exercise 1. Compute 345 + 678.\nplace 1: 5 + 8 + 0 = 13, write 3, carry 1\nplace 10: 4 + 7 + 1 = 12,"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert tokenizer.decode(ids[0]) == text
    with torch.no_grad():
        logits = ours(ids)[0]
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-3, atol=1e-3)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    assert loss < 2.5  # ln 4096 = 8.3 for a model that knows nothing


def test_committed_model_fits_the_repository() -> None:
    files = [path for path in checkpoint.MODEL_FOLDER.iterdir() if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 2 * 2**20
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    config = ModelConfig.from_hf(checkpoint.MODEL_FOLDER)
    assert (config.num_experts, config.num_experts_per_tok) == (64, 8)
    assert config.num_hidden_layers >= 6
