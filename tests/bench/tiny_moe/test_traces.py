"""Recording, and the committed traces."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bench.engines.tiny_moe import checkpoint  # noqa: E402
from bench.engines.tiny_moe.record_traces import DATA_FOLDER, record, route  # noqa: E402
from bench.engines.tiny_moe.report import expert_load, random_fanout  # noqa: E402
from bench.engines.tiny_moe.sources import DOMAINS  # noqa: E402
from bench.engines.tiny_moe.train import learning_rate, load_max_over_mean, windows  # noqa: E402
from sglang_eplb_affinity.domain.routing import RoutingTrace  # noqa: E402
from tests.bench.tiny_moe.test_model import SMALL, small_model  # noqa: E402


@pytest.fixture(scope="module")
def committed() -> dict[str, RoutingTrace]:
    return {name: RoutingTrace.load(DATA_FOLDER / f"tiny_moe_{name}.npz") for name in ("plan", "test")}


def test_committed_traces_fit_the_model_and_each_other(committed: dict[str, RoutingTrace]) -> None:
    config = checkpoint.ModelConfig.from_hf(checkpoint.MODEL_FOLDER)
    for trace in committed.values():
        assert (trace.num_layers, trace.num_experts, trace.top_k) == (
            config.num_hidden_layers,
            config.num_experts,
            config.num_experts_per_tok,
        )
        assert trace.domain_names == DOMAINS
        assert np.bincount(trace.domain).tolist() == [trace.num_tokens // len(DOMAINS)] * len(DOMAINS)
        ordered = np.sort(trace.topk_ids, -1)
        assert (np.diff(ordered, axis=-1) > 0).all()  # the experts of a token are distinct
    assert not np.array_equal(committed["plan"].topk_ids, committed["test"].topk_ids)


def test_routing_is_skewed_and_domains_use_different_experts(committed: dict[str, RoutingTrace]) -> None:
    """What random weights do not show, and what makes the traces worth planning on: it also holds for unseen text."""
    plan, test = committed["plan"], committed["test"]
    assert expert_load(test).max(1).mean() > 1.5
    same, other = [], []
    for d in range(len(DOMAINS)):
        use = expert_load(plan.select(plan.domain == d)).ravel()
        for e in range(len(DOMAINS)):
            correlation = np.corrcoef(use, expert_load(test.select(test.domain == e)).ravel())[0, 1]
            (same if d == e else other).append(correlation)
    assert min(same) > 0.8 > max(0.0, np.mean(other))


def test_recorded_rows_are_the_models_choices_in_turn() -> None:
    model = small_model()
    generator = np.random.default_rng(0)
    texts = {d: generator.integers(0, SMALL.vocab_size, 100).astype(np.uint16) for d in ("prose", "math")}
    trace = record(model, texts, sequences=3, length=10)
    assert trace.topk_ids.shape == (60, SMALL.num_hidden_layers, SMALL.num_experts_per_tok)
    assert trace.sequence.tolist() == np.repeat(np.arange(6), 10).tolist()
    assert [DOMAINS[d] for d in trace.domain[::10]] == ["prose", "math"] * 3
    last_math = route(model, texts["math"][None, 90:])[0]
    np.testing.assert_array_equal(trace.topk_ids[50:], last_math)


def test_statistics() -> None:
    ids = np.zeros((4, 1, 2), np.int16)
    ids[:, 0, 1] = [1, 2, 3, 1]
    assert expert_load(RoutingTrace(ids, 4)).tolist() == [[2.0, 1.0, 0.5, 0.5]]
    assert load_max_over_mean(torch.tensor([[[0, 1], [0, 2]], [[0, 1], [2, 3]]]), 4) == pytest.approx(1.5)
    assert random_fanout(8, 1, 4) == pytest.approx(1.0)
    assert random_fanout(8, 8, 4) == pytest.approx(4.0)


def test_schedule_and_windows() -> None:
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(101)]
    assert max(rates) == rates[9] == 1.0
    assert rates[0] == 0.1
    assert rates[100] == pytest.approx(0.02)
    batch = windows(torch.arange(50), torch.tensor([0, 7]), 4)
    assert batch.tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]
