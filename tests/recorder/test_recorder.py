"""The affinity recorder counts every real token once, whatever the layout of its rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_eplb_affinity.recorder import AffinityRecorder, RecorderConfig, RowLayout, TokenReservoir
from sglang_eplb_affinity.routing import coactivation_of
from sglang_eplb_affinity.window_reduce import Reduction, reduce_window, sample_shares

ALONE = Reduction(contributes=True)


def random_ids(random, rows, experts, k) -> torch.Tensor:
    if rows == 0:
        return torch.zeros(0, k, dtype=torch.int64)
    return torch.from_numpy(np.stack([random.permutation(experts)[:k] for _ in range(rows)]))


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=4),
    experts=st.integers(2, 20),
    passes=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    same_length=st.booleans(),
    data=st.data(),
)
def test_counts_coactivation_and_sample_cover_exactly_the_real_tokens(
    groups, experts, passes, seed, same_length, data
) -> None:
    k = data.draw(st.integers(1, experts))
    random = np.random.default_rng(seed)
    layers = 2
    recorder = AffinityRecorder(
        num_layers=layers,
        num_experts=experts,
        top_k=k,
        num_groups=len(groups),
        config=RecorderConfig(sample_tokens=500),
    )
    real: list[list[np.ndarray]] = [[] for _ in range(layers)]
    longest = max(tokens + padding for tokens, padding in groups)
    for _ in range(passes):
        recorder.begin_pass([tokens for tokens, _ in groups])
        rows = [longest if same_length else tokens + padding for tokens, padding in groups]
        for layer in range(layers):
            ids = random_ids(random, sum(rows), experts, k)
            recorder.record(layer, ids, RowLayout(tuple(rows)))
            start = 0
            for (tokens, _), length in zip(groups, rows, strict=True):
                real[layer].append(ids[start : start + tokens].numpy())
                start += length
        recorder.end_pass()
        recorder.record(0, random_ids(random, sum(rows), experts, k), RowLayout(tuple(rows)))  # a warm-up, not a pass
    window = reduce_window(recorder, ALONE)
    expected = np.stack([np.concatenate(parts) for parts in real])
    assert (window.counts == [np.bincount(ids.ravel(), minlength=experts) for ids in expected]).all()
    assert (window.coactivation == coactivation_of(expected, experts)).all()
    sampled = [sorted(map(tuple, layer[layer[:, 0] >= 0].tolist())) for layer in window.tokens]
    assert sampled == [sorted(map(tuple, layer.tolist())) for layer in expected]


def test_columns_of_fused_shared_experts_are_left_out() -> None:
    recorder = AffinityRecorder(num_layers=1, num_experts=4, top_k=2)
    recorder.begin_pass([1])
    recorder.record(0, torch.tensor([[1, 3, 4]]), RowLayout((1,)))
    assert reduce_window(recorder, ALONE).counts.tolist() == [[0, 1, 0, 1]]


def test_rows_that_only_the_device_can_count() -> None:
    recorder = AffinityRecorder(num_layers=1, num_experts=4, top_k=1)
    recorder.begin_pass([4])
    recorder.record(0, torch.tensor([[1], [2], [3], [3]]), RowLayout((4,)), torch.tensor(2))
    assert reduce_window(recorder, ALONE).counts.tolist() == [[0, 1, 1, 0]]


def test_reset_starts_an_empty_window() -> None:
    recorder = AffinityRecorder(num_layers=1, num_experts=4, top_k=1)
    recorder.begin_pass([1])
    recorder.record(0, torch.tensor([[1]]), RowLayout((1,)))
    recorder.reset()
    window = reduce_window(recorder, ALONE)
    assert not window.counts.any() and (window.tokens == -1).all() and recorder.seen_tokens == 0


def test_counts_stay_exact_beyond_float32_integers() -> None:
    recorder = AffinityRecorder(
        num_layers=1, num_experts=2, top_k=1, config=RecorderConfig(sample_tokens=4, max_pass_tokens=8)
    )
    recorder._recent[0, 1, 1] = float((1 << 24) - 1)
    recorder._recent_tokens = (1 << 24) - 1
    for _ in range(3):
        recorder.begin_pass([1])
        recorder.record(0, torch.tensor([[1]]), RowLayout((1,)))
    assert reduce_window(recorder, ALONE).counts.tolist() == [[0, (1 << 24) + 2]]


def test_reservoir_is_uniform_over_the_stream() -> None:
    stream, capacity, trials = 400, 40, 300
    hits = np.zeros(stream)
    for seed in range(trials):
        reservoir, content = TokenReservoir(capacity, seed), np.full(capacity + 1, -1)
        for start in range(0, stream, 25):
            slots = reservoir.offer(25)
            used = slots[slots < capacity]
            assert len(set(used.tolist())) == len(used)
            content[slots] = np.arange(start, start + 25)
        hits[content[:capacity]] += 1
    # Binomial(300, 0.1): mean 30, deviation 5.2; quarters of the stream have deviation 52 around 3000.
    quarters = hits.reshape(4, -1).sum(1)
    assert (abs(quarters - trials * capacity / 4) < 4 * 52).all()


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.integers(1, 10_000))
def test_sample_shares_fill_the_sample_in_proportion(seen, capacity) -> None:
    shares = sample_shares(np.array(seen), capacity)
    total = sum(seen)
    assert shares.sum() == min(total, capacity)
    assert (shares <= np.array(seen)).all()
    if total:
        assert (abs(shares - np.array(seen) * min(1, capacity / total)) <= 1).all()


def _worker(rank: int, world: int, file: str, queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    recorder = AffinityRecorder(num_layers=2, num_experts=6, top_k=2, config=RecorderConfig(sample_tokens=16))
    random = np.random.default_rng(rank)
    tokens = [30, 10, 0][rank]
    recorder.begin_pass([tokens])
    for layer in range(2):
        recorder.record(layer, random_ids(random, tokens, 6, 2), RowLayout((tokens,)))
    window = reduce_window(recorder, Reduction(contributes=rank < 2))
    queue.put((rank, window.counts.tolist(), window.coactivation.tolist(), window.tokens.tolist()))
    torch.distributed.destroy_process_group()


def test_all_ranks_get_the_same_sum(tmp_path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_worker, args=(rank, 3, str(tmp_path / "init"), queue)) for rank in range(3)]
    for worker in workers:
        worker.start()
    results = sorted(queue.get() for _ in workers)
    for worker in workers:
        worker.join()
    assert results[0][1:] == results[1][1:] == results[2][1:]
    counts, tokens = np.array(results[0][1]), np.array(results[0][3])
    assert (counts.sum(1) == 80).all()
    assert (tokens[:, :, 0] >= 0).sum(1).tolist() == [16, 16]
    own = [
        {tuple(row) for row in random_ids(np.random.default_rng(rank), [30, 10][rank], 6, 2).tolist()}
        for rank in range(2)
    ]
    assert {tuple(row) for row in tokens[0].tolist()} <= own[0] | own[1]


@pytest.mark.gpu
def test_recording_in_a_cuda_graph_equals_eager() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    eager = AffinityRecorder(num_layers=2, num_experts=64, top_k=8, device="cuda")
    graphed = AffinityRecorder(num_layers=2, num_experts=64, top_k=8, device="cuda")
    random = np.random.default_rng(0)
    static_ids = random_ids(random, 16, 64, 8).cuda()
    graphed.record(0, static_ids, RowLayout((16,)))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(2):
            graphed.record(layer, static_ids, RowLayout((16,)))
    for tokens in (16, 3, 0, 9):
        static_ids.copy_(random_ids(random, 16, 64, 8))
        for recorder in (eager, graphed):
            recorder.begin_pass([tokens])
        for layer in range(2):
            eager.record(layer, static_ids, RowLayout((16,)))
        graph.replay()
        for recorder in (eager, graphed):
            recorder.end_pass()
    graph.replay()  # outside a pass: counts nothing
    assert torch.equal(eager.totals(), graphed.totals()) and torch.equal(eager.sample(), graphed.sample())
