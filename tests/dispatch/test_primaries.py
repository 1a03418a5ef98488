"""Primary slots: the evenest choice of one slot an expert that a map allows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_eplb_affinity.dispatch.primaries import primaries_of
from sglang_eplb_affinity.dispatch.small_passes import most_tokens
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology


def counts_of(slots: list[int], experts: int, gpus: int) -> np.ndarray:
    """Experts whose primary slot each GPU has."""
    expert_map = ExpertMap(np.array([slots], np.int32), experts)
    primary = primaries_of(expert_map.logical_to_all_physical(), Topology(gpus), len(slots))[0]
    assert (np.asarray(slots)[primary] == np.arange(experts)).all()
    return np.bincount(primary // (len(slots) // gpus), minlength=gpus)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_choice_is_more_even(data) -> None:  # type: ignore[no-untyped-def]
    gpus = data.draw(st.integers(1, 4))
    experts = data.draw(st.integers(1, 6))
    per_gpu = -(-experts // gpus) + data.draw(st.integers(0, 2))
    size = per_gpu * gpus - experts
    more = data.draw(st.lists(st.integers(0, experts - 1), min_size=size, max_size=size))
    slots = data.draw(st.permutations([*range(experts), *more]))
    found = counts_of(slots, experts, gpus)
    places = [sorted({slot // per_gpu for slot, expert in enumerate(slots) if expert == e}) for e in range(experts)]
    every = [np.bincount(choice, minlength=gpus) for choice in itertools.product(*places)]
    assert found.max() == min(count.max() for count in every)
    assert (found**2).sum() == min((count**2).sum() for count in every)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 32), st.integers(0, 32))
def test_two_gpus_without_an_expert_twice_on_one_are_even(seed: int, half: int, more: int) -> None:
    experts, redundant = 2 * half, 2 * min(more // 2, half)
    order = np.random.default_rng(seed).permutation(experts)
    both, own = order[:redundant], order[redundant:]
    left, right = np.r_[both, own[: len(own) // 2]], np.r_[both, own[len(own) // 2 :]]
    assert counts_of([*left, *right], experts, 2).tolist() == [half, half]


def test_where_a_map_allows_no_even_choice() -> None:
    start = [*range(256), *range(32)]  # SGLang's first placement
    assert counts_of(start, 256, 8).tolist() == [20, 36, 36, 36, 36, 36, 36, 20]


def test_the_size_of_a_small_pass() -> None:
    """8 rows of a primary slot for each redundant slot of a GPU: 8 slots of 8 experts, over a top-8."""
    assert most_tokens(256, 256, 8, 32, own_tokens=True) == 64
    assert most_tokens(256, 32, 8, 32, own_tokens=True) == 8
    assert most_tokens(64, 8, 8, 2, own_tokens=True) == 128
    assert most_tokens(64, 8, 8, 2, own_tokens=False) == 256  # every rank has the tokens of both
    assert most_tokens(64, 24, 8, 2, own_tokens=True) == most_tokens(64, 64, 8, 2, own_tokens=True) == 96 * 4
    assert most_tokens(256, 32, 8, 72, own_tokens=True) == 1  # 3 or 4 experts a GPU: all choices uneven
    assert most_tokens(64, 0, 8, 2, own_tokens=True) == 0


def test_layers_are_apart() -> None:
    rows = np.array([[0, 1, 1, 0], [0, 0, 1, 1]], np.int32)
    table = ExpertMap(rows, 2).logical_to_all_physical()
    assert primaries_of(table, Topology(2), 4).tolist() == [[0, 2], [0, 2]]
    with pytest.raises(Exception, match="divide"):
        primaries_of(table, Topology(3), 4)
