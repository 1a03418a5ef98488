"""Dealers: what they pick, and how even the queues stay in a closed loop."""

import numpy as np
import pytest

from bench.requests.dealing import Nearest, RoundRobin, SamePrompt, ShortestQueue, deal

LENGTHS = np.array([20, 30, 40, 25, 35, 30, 45, 15])


def test_nearest_looks_at_experts_only_within_the_band() -> None:
    dealer = Nearest(np.array([[0.0, 3.0, 2.0]], np.float32), band=2)
    assert dealer.pick(0, np.array([4, 6, 4])) == 1
    assert dealer.pick(0, np.array([4, 7, 4])) == 2
    assert dealer.pick(0, np.array([4, 7, 9])) == 0


def test_equally_near_ranks_get_the_shorter_queue() -> None:
    assert Nearest(np.array([[1.0, 1.0]], np.float32), band=5).pick(0, np.array([3, 1])) == 1


def test_round_robin_takes_turns_and_shortest_queue_the_least() -> None:
    turns = RoundRobin()
    assert [turns.pick(0, np.array([9, 0, 0])) for _ in range(4)] == [0, 1, 2, 0]
    assert ShortestQueue().pick(0, np.array([2, 1, 3])) == 1


def test_a_prompt_met_again_goes_where_it_was_unless_that_rank_is_full() -> None:
    dealer = SamePrompt(band=1)
    first = dealer.pick(5, np.array([0, 0]))
    queue = np.array([0, 0])
    queue[first] = 1
    assert dealer.pick(5, queue) == first
    queue[first] = 2
    assert dealer.pick(5, queue) != first


@pytest.mark.parametrize("band", [1, 4])
def test_queues_stay_within_the_band_when_all_want_one_rank(band: int) -> None:
    score = np.tile(np.array([0.0, 1.0, 0.0, 0.0], np.float32), (len(LENGTHS), 1))
    result = deal(Nearest(score, band), LENGTHS, ranks=4, running_per_rank=16, steps=3)
    assert 1 + 0.3 * band / 16 < result.queue_max_over_mean <= 1 + 1.5 * band / 16
    for step in result.steps:
        assert len(step.request) == 64
        assert (step.age < LENGTHS[step.request]).all()


def test_the_same_prompt_is_met_again_where_it_is_sent_on_purpose() -> None:
    lengths = np.full(64, 20)
    kept = deal(SamePrompt(8), lengths, ranks=4, running_per_rank=16, steps=1)
    dealt = deal(RoundRobin(), lengths, ranks=4, running_per_rank=16, steps=1)
    assert kept.repeats_hit > 0.85
    assert dealt.repeats_hit == pytest.approx(24 / 64, abs=0.12)  # a cache holds 24 of 64 prompts


def test_equal_seeds_give_equal_steps() -> None:
    first, second = (deal(RoundRobin(), LENGTHS, 2, 8, 2, seed=4) for _ in range(2))
    assert (first.steps[1].request == second.steps[1].request).all()
