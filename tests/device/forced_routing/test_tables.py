"""Balanced tables: exact balance over any batch, distinct experts, fan-out as named."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_eplb_affinity.device.forced_routing import balanced_table, fanout, random_fanout
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.topology import Topology

VARIANTS = ("", "spread", "local")


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, Topology]:
    """Experts, k, GPUs and nodes; k need not divide the experts, nor the experts of a GPU."""
    nodes, per_node, per_gpu = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 12))
    experts = nodes * per_node * per_gpu
    return experts, draw(st.integers(1, min(experts, 12))), Topology(nodes * per_node, nodes)


@settings(max_examples=150, deadline=None)
@given(shapes(), st.sampled_from(VARIANTS), st.integers(0, 500), st.integers(1, 200), st.integers(0, 3))
def test_any_batch_is_balanced_and_tokens_have_distinct_experts(
    shape: tuple[int, int, Topology], variant: str, start: int, tokens: int, layer: int
) -> None:
    experts, k, topology = shape
    rows = balanced_table(variant, 4, experts, k, topology)[layer]
    ids = rows[(start + np.arange(tokens)) % len(rows)]
    counts = np.bincount(ids.ravel(), minlength=experts)
    assert counts.max() - counts.min() <= 1
    assert len(counts) == experts
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()


@settings(max_examples=100, deadline=None)
@given(shapes())
def test_spread_is_as_wide_and_local_as_narrow_as_exact_balance_allows(shape: tuple[int, int, Topology]) -> None:
    experts, k, topology = shape
    gpus, per_gpu = topology.num_gpus, experts // topology.num_gpus
    table = {variant: balanced_table(variant, 3, experts, k, topology) for variant in VARIANTS}
    for layer in range(3):
        assert fanout(table["spread"][layer], experts, topology) == min(k, gpus)
        # Tokens and GPUs of one round as a graph whose edges are the visits: a component that has all its assignments
        # inside holds a multiple of lcm(k, experts of a GPU) of them and, being connected, at least tokens + GPUs - 1
        # edges. So a round of `rows` tokens visits at least rows + GPUs - components GPUs.
        if experts % math.lcm(k, per_gpu) == 0:
            rows, components = experts // k, experts // math.lcm(k, per_gpu)
            bound = (rows + gpus - components) / rows
            assert fanout(table["local"][layer], experts, topology) == pytest.approx(bound)
        assert fanout(table["local"][layer], experts, topology) <= math.ceil(k / per_gpu) + 1
        nodes = Topology(topology.num_nodes)
        assert fanout(table["spread"][layer], experts, nodes) == min(k, topology.num_nodes)


@pytest.mark.parametrize("experts, k, gpus", [(64, 8, 8), (256, 8, 8), (256, 8, 32), (128, 8, 16), (32, 4, 8)])
def test_plain_has_the_fanout_of_random_routing(experts: int, k: int, gpus: int) -> None:
    topology = Topology(gpus)
    table = balanced_table("", 24, experts, k, topology)
    mean = np.mean([fanout(rows, experts, topology) for rows in table])
    assert mean == pytest.approx(random_fanout(experts, k, topology), rel=0.02)
    assert len({rows.tobytes() for rows in table}) == len(table)  # layers differ


def test_random_fanout_against_drawing() -> None:
    topology = Topology(8)
    generator = np.random.default_rng(0)
    drawn = np.argsort(generator.random((20000, 64)), axis=1)[:, :8]
    assert fanout(drawn, 64, topology) == pytest.approx(random_fanout(64, 8, topology), abs=0.02)


def test_tables_are_deterministic_and_small() -> None:
    first = balanced_table("", 58, 256, 8, Topology(32, 4))
    assert np.array_equal(first, balanced_table("", 58, 256, 8, Topology(32, 4)))
    assert first.shape == (58, 32, 8)
    assert first.dtype == np.int16


def test_one_round_uses_every_expert_once_in_each_layer() -> None:
    for variant in VARIANTS:
        for rows in balanced_table(variant, 5, 64, 8, Topology(8)):
            assert sorted(rows.ravel().tolist()) == list(range(64))


def test_spread_and_local_need_experts_that_divide() -> None:
    with pytest.raises(InputError, match="60 experts do not divide evenly over 8 GPUs"):
        balanced_table("local", 2, 60, 4, Topology(8))
    assert balanced_table("", 2, 60, 4, Topology(8)).shape == (2, 15, 4)
