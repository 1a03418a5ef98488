"""The affinity recorder counts every real token once, whatever the layout of its rows."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_eplb_affinity.device.recorder import AffinityRecorder, RecorderConfig, RecordSchedule, RowLayout
from sglang_eplb_affinity.device.reservoir import TokenReservoir
from sglang_eplb_affinity.domain.routing import coactivation_of, estimated_coactivation
from sglang_eplb_affinity.rebalance.window_reduce import Reduction, reduce_window, sample_shares

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
    pairs = estimated_coactivation(window.counts, window.tokens)
    assert (pairs == coactivation_of(expected, experts)).all()
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


def test_phases_are_counted_and_sampled_apart() -> None:
    recorder = AffinityRecorder(num_layers=1, num_experts=4, top_k=1, config=RecorderConfig(sample_tokens=8))
    for phase, experts in ((0, [0, 1, 1]), (1, [2]), (0, [3])):
        recorder.begin_pass([len(experts)], phase)
        recorder.record(0, torch.tensor(experts)[:, None], RowLayout((len(experts),)))
    window = reduce_window(recorder, ALONE)
    assert window.phase_counts.tolist() == [[[1, 2, 0, 1]], [[0, 0, 1, 0]]]
    assert window.token_phase.tolist() == [0, 0, 0, 1, 0, -1, -1, -1]
    assert window.prefill_share == 0.8


def test_phase_counts_are_taken_over_the_ends_of_windows() -> None:
    recorder = AffinityRecorder(num_layers=1, num_experts=2, top_k=1)

    def passes(count: int) -> None:
        for _ in range(count):
            recorder.begin_pass([1], phase=1)
            recorder.record(0, torch.tensor([[1]]), RowLayout((1,)))

    passes(2)
    assert recorder.take_phase_counts()[1].tolist() == [[0, 2]]
    passes(3)
    recorder.reset()
    passes(1)
    assert recorder.take_phase_counts()[1].tolist() == [[0, 4]]
    assert recorder.take_phase_counts().sum() == 0
    assert recorder.counts[1].tolist() == [[0, 1]]


def test_passes_that_are_not_recorded_leave_nothing() -> None:
    recorder = AffinityRecorder(num_layers=1, num_experts=4, top_k=1, config=RecorderConfig(sample_tokens=8))
    for number in range(4):
        recorder.begin_pass([2], record=number % 2 == 0)
        recorder.record(0, torch.tensor([[number], [number]]), RowLayout((2,)))
    window = reduce_window(recorder, ALONE)
    assert window.counts.tolist() == [[2, 0, 2, 0]]
    assert window.tokens[0, :5, 0].tolist() == [0, 0, 2, 2, -1] and recorder.seen_tokens == 4


def test_schedule_takes_every_nth_of_the_last_passes() -> None:
    assert [number for number in range(7) if RecordSchedule().records(number)] == list(range(7))
    assert [number for number in range(12) if RecordSchedule(3, 5, 10).records(number)] == [6, 9]


def test_coactivation_of_all_tokens_is_estimated_from_the_sample() -> None:
    random = np.random.default_rng(0)
    recorder = AffinityRecorder(num_layers=1, num_experts=8, top_k=3, config=RecorderConfig(sample_tokens=400))
    ids = random_ids(random, 4000, 8, 3)
    recorder.begin_pass([4000])
    recorder.record(0, ids, RowLayout((4000,)))
    window = reduce_window(recorder, ALONE)
    pairs, exact = estimated_coactivation(window.counts, window.tokens)[0], coactivation_of(ids.numpy()[None], 8)[0]
    # A pair's count in the sample is binomial with mean 43; scaled tenfold its deviation is about 62.
    assert abs(pairs.sum() - exact.sum()) < 8 * 7 and (abs(pairs - exact) < 5 * 62).all()


def test_reservoir_is_uniform_over_the_stream() -> None:
    stream, capacity, trials = 400, 40, 300
    hits, tokens_of_slot = np.zeros(stream), np.zeros(capacity)
    for seed in range(trials):
        reservoir, content = TokenReservoir(capacity, seed), np.full(capacity, -1)
        for start in range(0, stream, 25):
            tokens, slots = reservoir.offer(25)
            assert len(set(slots.tolist())) == len(slots)
            content[slots] = start + tokens
        hits[content] += 1
        tokens_of_slot += content >= stream / 2
    # Binomial(300, 0.1): mean 30, deviation 5.2; quarters of the stream have deviation 52 around 3000.
    quarters = hits.reshape(4, -1).sum(1)
    assert (abs(quarters - trials * capacity / 4) < 4 * 52).all()
    # Every slot is as likely to hold a late token: Binomial(300, 0.5), deviation 8.7.
    assert (abs(tokens_of_slot - trials / 2) < 5 * 8.7).all()


def test_reservoir_depends_neither_on_how_the_stream_is_cut_nor_on_windows_before() -> None:
    contents = []
    used = TokenReservoir(64, 3)
    for step, reservoir in ((1, used), (7, TokenReservoir(64, 3)), (5000, used)):
        reservoir.reset()
        content = np.full(64, -1)
        for start in range(0, 5000, step):
            tokens, slots = reservoir.offer(min(step, 5000 - start))
            content[slots] = start + tokens
        contents.append(content.tolist())
    assert contents[0] == contents[1] == contents[2]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.integers(1, 10_000))
def test_sample_shares_fill_the_sample_in_proportion(seen, capacity) -> None:
    shares = sample_shares(np.array(seen), np.minimum(seen, capacity), capacity)
    total = sum(seen)
    assert shares.sum() == min(total, capacity)
    assert (shares <= np.array(seen)).all()
    if total:
        assert (abs(shares - np.array(seen) * min(1, capacity / total)) <= 1).all()


def test_what_a_rank_lacks_of_its_share_others_give() -> None:
    shares = sample_shares(np.array([100, 100, 100]), np.array([8, 11, 10]), 30)
    assert shares.tolist() == [8, 11, 10]
    assert sample_shares(np.array([300, 100, 0]), np.array([20, 40, 0]), 40).tolist() == [20, 20, 0]


def _worker(rank: int, world: int, file: str, queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    recorder = AffinityRecorder(num_layers=2, num_experts=6, top_k=2, config=RecorderConfig(sample_tokens=16))
    random = np.random.default_rng(rank)
    tokens = [30, 10, 0][rank]
    recorder.begin_pass([tokens])
    for layer in range(2):
        recorder.record(layer, random_ids(random, tokens, 6, 2), RowLayout((tokens,)))
    window = reduce_window(recorder, Reduction(contributes=rank < 2))
    queue.put((rank, window.counts.tolist(), window.phase_counts.tolist(), window.tokens.tolist()))
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
