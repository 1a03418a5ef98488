"""Traces and windows: what is read is what was written, statistics are exact, bad files are refused in one line."""

import numpy as np
import pytest

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow, coactivation_of


def trace(tokens=50, layers=3, experts=9, k=4, seed=0) -> RoutingTrace:
    random = np.random.default_rng(seed)
    ids = np.stack([np.stack([random.permutation(experts)[:k] for _ in range(layers)]) for _ in range(tokens)])
    return RoutingTrace(
        ids.astype(np.int16),
        experts,
        np.arange(tokens, dtype=np.int32) // 10,
        (np.arange(tokens) % 2).astype(np.int8),
        ("prose", "code"),
    )


def test_saved_trace_is_read_back(tmp_path) -> None:
    written = trace()
    written.save(tmp_path / "t.npz")
    read = RoutingTrace.load(tmp_path / "t.npz")
    assert (read.topk_ids == written.topk_ids).all() and read.num_experts == 9
    assert (read.sequence == written.sequence).all() and (read.domain == written.domain).all()
    assert read.domain_names == ("prose", "code")


def test_window_statistics_are_exact() -> None:
    t = trace()
    window = RoutingWindow.from_trace(t)
    for layer in range(t.num_layers):
        for a in range(t.num_experts):
            has_a = (t.topk_ids[:, layer] == a).any(1)
            assert window.counts[layer, a] == has_a.sum()
            for b in range(t.num_experts):
                both = has_a & (t.topk_ids[:, layer] == b).any(1)
                assert window.coactivation[layer, a, b] == (0 if a == b else both.sum())


def test_unused_rows_do_not_count() -> None:
    tokens = np.array([[[0, 1], [-1, -1], [1, 2]]])
    assert coactivation_of(tokens, 3)[0].tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]


def test_token_sample_is_spread_over_the_trace() -> None:
    ids = np.zeros((10_000, 1, 1), dtype=np.int16)
    ids[5000:] = 1
    sample = RoutingWindow.from_trace(RoutingTrace(ids, 2), sample_size=1000).tokens
    assert 400 < (sample == 1).sum() < 600


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"num_experts": 4}, "has no array 'topk_ids'"),
        ({"topk_ids": np.zeros((2, 2, 2), np.int16)}, "has no array 'num_experts'"),
        ({"topk_ids": np.zeros((2, 2), np.int16), "num_experts": 4}, "integers of shape [tokens, layers, k]"),
        ({"topk_ids": np.full((2, 2, 2), 7, np.int16), "num_experts": 4}, "is 7, but ids must be 0 to 3"),
        ({"topk_ids": np.zeros((0, 2, 2), np.int16), "num_experts": 4}, "holds no tokens"),
        (
            {"topk_ids": np.zeros((2, 2, 2), np.int16), "num_experts": 4, "sequence": np.zeros(3, np.int32)},
            "sequence has shape (3,)",
        ),
    ],
)
def test_wrong_traces_are_refused_with_their_name(tmp_path, arrays, message) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError) as error:
        RoutingTrace.load(path)
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_trace_is_refused(tmp_path) -> None:
    path = tmp_path / "text.npz"
    path.write_text("hello")
    with pytest.raises(InputError, match=r"text\.npz"):
        RoutingTrace.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        RoutingTrace.load(tmp_path / "missing.npz")
