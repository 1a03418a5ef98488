from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, plan
from sglang_eplb_affinity.simulate.routing_model import RoutingModel, expand
from sglang_eplb_affinity.simulate.source import RoutingSource
from sglang_eplb_affinity.simulate.system import load_system


@pytest.fixture
def model(system_file):
    return load_system(str(system_file)).model


def fanouts(plan_tokens, test_tokens, experts):
    """(contiguous, planned GPU fan-out, contiguous load) on 4 GPUs."""
    counts = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in plan_tokens]).astype(np.int64)
    topology = Topology(4, 1)
    planned = plan(RoutingWindow(counts, None, plan_tokens), topology, experts, PlannerConfig()).expert_map
    plain = ExpertMap.contiguous(len(plan_tokens), experts, experts)
    before = measure(test_tokens, plain, topology, "static", None)
    after = measure(test_tokens, planned, topology, "static", None)
    return before.gpu_fanout.mean(), after.gpu_fanout.mean(), before.load_max_over_mean.mean()


def test_same_size_keeps_load_and_fanout_of_the_recording(trace, model):
    layers = np.arange(3)
    made = RoutingModel(trace, model, layers)
    rows = np.arange(trace.num_tokens)
    first, second = made.draw(rows[:2048], 1), made.draw(rows[2048:], 2)
    real = trace.topk_ids.transpose(1, 0, 2)
    recorded = fanouts(np.ascontiguousarray(real[:, :2048]), np.ascontiguousarray(real[:, 2048:]), 16)
    drawn = fanouts(first, second, 16)
    np.testing.assert_allclose(drawn, recorded, rtol=0.08)
    assert recorded[1] < 0.9 * recorded[0]  # the recording has affinity to keep


def test_larger_model_keeps_affinity_and_draws_valid_sets(trace, model):
    larger = dataclasses.replace(model, experts=64)
    made = RoutingModel(trace, larger, np.arange(3))
    rows = np.arange(trace.num_tokens)
    first, second = made.draw(rows[:2048], 1), made.draw(rows[2048:], 2)
    assert first.min() >= 0 and first.max() < 64
    assert all(len(set(row)) == 4 for row in first.reshape(-1, 4)[:500].tolist())
    before, after, _ = fanouts(first, second, 64)
    assert after < 0.93 * before


def test_group_limited_tokens_stay_in_their_groups(trace, model):
    limited = dataclasses.replace(model, experts=64, expert_groups=8, groups_per_token=2)
    tokens = RoutingModel(trace, limited, np.arange(2)).draw(np.arange(512), 3)
    groups = tokens.reshape(-1, 4) // 8
    assert max(len(set(row)) for row in groups.tolist()) <= 2
    assert all(len(set(row)) == 4 for row in tokens.reshape(-1, 4).tolist())


def test_draws_are_repeatable_and_differ_by_seed(trace, model):
    made = RoutingModel(trace, model, np.arange(2))
    again = RoutingModel(trace, model, np.arange(2))
    rows = np.arange(300)
    np.testing.assert_array_equal(made.draw(rows, 5), again.draw(rows, 5))
    assert (made.draw(rows, 5) != made.draw(rows, 6)).any()


def test_children_share_their_parents_weight():
    weights = np.array([[1.0, 2.0, 4.0, 8.0]])
    children = expand(weights, 8, 0.0, 0)
    assert children.sum() == pytest.approx(15.0)
    assert sorted(np.unique(children).tolist()) == [0.5, 1.0, 2.0, 4.0]


def test_own_recording_is_used_as_it_is(trace, model):
    source = RoutingSource(trace, None, model, np.arange(3))
    assert source.recorded and source.label.startswith("recorded routing")
    assert not set(source.plan_rows) & set(source.test_rows)
    tokens, gpus, scale = source.batch(32, 8, False, 0)
    assert tokens.shape == (3, 256, 4) and scale == 1
    np.testing.assert_array_equal(np.bincount(gpus), np.full(8, 32))
    known = {tuple(row) for row in trace.topk_ids[source.test_rows, 0].tolist()}
    assert {tuple(row) for row in tokens[0].tolist()} <= known


def test_made_routing_says_so(trace, model):
    source = RoutingSource(trace, None, dataclasses.replace(model, experts=32), np.arange(2))
    assert source.label.startswith("simulated routing, fitted to made.npz")


def test_test_trace_of_another_model_is_refused(trace, model):
    from tests.simulate.conftest import make_trace

    with pytest.raises(InputError, match="32 experts"):
        RoutingSource(trace, make_trace(32), model, np.arange(2))
