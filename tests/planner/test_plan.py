"""Properties of every plan: valid maps, determinism, never worse than EPLB's own map on the plan sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, drifted_layers, eplb_placement, guarded_map, plan
from sglang_eplb_affinity.planner.judge import Earlier, Judgement, judge
from sglang_eplb_affinity.planner.plan_layer import NO_AFFINITY, NO_TRAFFIC, NOT_BETTER
from tests.planner.windows import RELAXED, problems, skewed_tokens, window_of

ROOT = Path(__file__).parents[2]


@RELAXED
@given(problems(), st.sampled_from(["cover", "static", "dynamic"]), st.sampled_from(["normal", "low_latency", "mixed"]))
def test_every_plan_is_valid_and_not_worse_than_eplb(problem, rule, objective):  # type: ignore[no-untyped-def]
    window, topology, slots = problem
    result = plan(window, topology, slots, PlannerConfig(dispatch=rule, objective=objective))
    placed = result.expert_map.physical_to_logical
    assert placed.shape == (window.num_layers, slots)
    assert (result.expert_map.replica_counts() >= 1).all()
    for layer, reason in enumerate(result.report.fallback):
        if not reason:
            for gpu in placed[layer].reshape(topology.num_gpus, -1):
                assert len(set(gpu.tolist())) == len(gpu)
    better = result.report.planned.cost <= result.report.eplb.cost + 1e-9
    lighter = result.report.planned.load_max_over_mean < result.report.eplb.load_max_over_mean
    assert (better | lighter).all()


@pytest.mark.parametrize("rule", ["cover", "dynamic"])
@pytest.mark.parametrize("redundant", [0, 8])
def test_equal_input_gives_equal_maps_for_any_number_of_threads(rule, redundant):  # type: ignore[no-untyped-def]
    tokens = skewed_tokens(np.random.default_rng(1), 4, 500, 32, 4)
    window = window_of(tokens, 32)
    plans = [
        plan(window, Topology(8, 2), 32 + redundant, PlannerConfig(dispatch=rule, threads=threads))
        for threads in (1, 3, 1)
    ]
    for other in plans[1:]:
        assert (plans[0].expert_map.physical_to_logical == other.expert_map.physical_to_logical).all()


def test_renamed_experts_get_the_same_places():
    # Without replicas nothing depends on an expert's number, as long as loads are untied.
    tokens = skewed_tokens(np.random.default_rng(4), 1, 700, 24, 3)
    window = window_of(tokens, 24)
    counts = window.counts * 1000 + np.random.default_rng(5).permutation(24)[None]
    rename = np.random.default_rng(6).permutation(24)
    renamed = np.empty_like(counts)
    renamed[:, rename] = counts
    first = plan(RoutingWindow(counts, None, tokens), Topology(4, 2), 24)
    second = plan(RoutingWindow(renamed, None, rename[tokens].astype(np.int16)), Topology(4, 2), 24)
    assert first.report.fallback == ("",)
    assert (rename[first.expert_map.physical_to_logical] == second.expert_map.physical_to_logical).all()


def test_a_strict_cap_holds_on_the_window():
    tokens = skewed_tokens(np.random.default_rng(7), 3, 2000, 32, 4)
    config = PlannerConfig(max_load_increase=0.02, load_noise_allowance=0.0)
    report = plan(window_of(tokens, 32), Topology(4, 2), 32, config).report
    assert (report.planned.load_max_over_mean <= report.eplb.load_max_over_mean * 1.02 + 1e-6).all()
    assert report.planned.gpu_fanout.mean() < report.eplb.gpu_fanout.mean()


def test_static_dispatch_leaves_no_layer_to_eplb():
    ids = RoutingTrace.load(ROOT / "bench" / "data" / "tiny_moe_test.npz").topk_ids
    tokens = np.ascontiguousarray(ids[::6].transpose(1, 0, 2))
    for topology in (Topology(4), Topology(8), Topology(8, 2)):
        report = plan(
            window_of(tokens, 64), topology, 64 + 4 * topology.num_gpus, PlannerConfig(dispatch="static")
        ).report
        assert report.fallback == ("",) * 6
        assert (report.planned.cost < report.eplb.cost).all()


def test_low_latency_spreads_replicas_over_nodes():
    # One copy per token and expert is paid for: only replicas of hot experts on both nodes can save any.
    tokens = skewed_tokens(np.random.default_rng(9), 1, 2000, 16, 4)
    config = PlannerConfig(objective="low_latency", dispatch="static", effort="thorough")
    report = plan(window_of(tokens, 16), Topology(4, 2), 24, config).report
    assert report.planned.cost[0] < report.eplb.cost[0]


def test_the_guard_gives_overloaded_layers_back_to_eplb():
    rng = np.random.default_rng(10)
    before, after = skewed_tokens(rng, 3, 1500, 32, 4), skewed_tokens(rng, 3, 1500, 32, 4)
    topology, config = Topology(8, 2), PlannerConfig()
    old = window_of(before, 32)
    eplb, affinity = eplb_placement(old.counts, topology, 32), plan(old, topology, 32, config).expert_map
    new = window_of(after, 32)
    drifted = drifted_layers(new, topology, affinity, eplb, config)
    guarded = guarded_map(affinity, eplb, drifted)
    loads = [measure(after, m, topology, "cover", None).load_max_over_mean for m in (affinity, eplb, guarded)]
    assert (drifted == (loads[0] > loads[1] * 1.01)).all()
    assert (loads[2] <= loads[1] * 1.01 + 1e-9).all()
    assert drifted.any()


def test_kernels_compile_without_a_cache_directory(monkeypatch, caplog):  # type: ignore[no-untyped-def]
    real = numba.njit

    def refuse(**options):  # type: ignore[no-untyped-def]
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", refuse)
    doubled = kernel(lambda x: 2 * x)
    assert doubled(21) == 42
    assert "NUMBA_CACHE_DIR" in caplog.text


def test_tied_counts_plan_deterministically():
    tokens = np.tile(np.arange(32, dtype=np.int16).reshape(1, 8, 4), (2, 20, 1))
    window = window_of(tokens, 32)
    first, second = (plan(window, Topology(4), 40).expert_map.physical_to_logical for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize("redundant", [0, 8])
@pytest.mark.parametrize("use_tokens", [True, False])
def test_experts_that_fire_together_meet_on_a_gpu(redundant, use_tokens):  # type: ignore[no-untyped-def]
    # Four groups of eight experts, each token draws all its experts from one group: fan-out can fall to 1.
    rng = np.random.default_rng(0)
    groups = rng.permutation(32).reshape(4, 8)
    tokens = np.stack([rng.permutation(groups[rng.integers(4)])[:4] for _ in range(2000)])[None].astype(np.int16)
    window = window_of(tokens, 32)
    if not use_tokens:
        window = RoutingWindow(window.counts, window.coactivation, None)
    result = plan(window, Topology(4), 32 + redundant, PlannerConfig(max_load_increase=0.1, effort="thorough"))
    # With replicas the search also balances blocks of time, and stops a little short of 1.
    assert result.report.planned.gpu_fanout[0] < (1.1 if redundant == 0 else 1.4)
    assert result.report.eplb.gpu_fanout[0] > 1.8


def test_layers_without_traffic_keep_their_map():
    tokens = skewed_tokens(np.random.default_rng(2), 2, 300, 16, 4)
    window = window_of(tokens, 16)
    counts, pairs = window.counts.copy(), window.coactivation.copy()
    counts[1], pairs[1], tokens[1] = 0, 0, -1
    window = RoutingWindow(counts, pairs, tokens)
    current = eplb_placement(counts[::-1].copy(), Topology(4), 16)
    assert plan(window, Topology(4), 16).report.fallback[1] == NO_TRAFFIC
    kept = plan(window, Topology(4), 16, PlannerConfig(), current)
    assert (kept.expert_map.physical_to_logical[1] == current.physical_to_logical[1]).all()


def test_counts_alone_give_eplbs_map():
    window = RoutingWindow(np.arange(1, 17, dtype=np.int64)[None])
    result = plan(window, Topology(4), 16)
    assert result.report.fallback == (NO_AFFINITY,)
    assert (
        result.expert_map.physical_to_logical == eplb_placement(window.counts, Topology(4), 16).physical_to_logical
    ).all()


@pytest.mark.parametrize(
    ("slots", "counts", "config", "current_slots", "message"),
    [
        (18, 1, {}, None, "do not divide"),
        (12, 1, {}, None, "cannot hold"),
        (68, 1, {}, None, "use at most 64"),
        (16, 0, {}, None, "empty"),
        (16, -1, {}, None, "negative"),
        (16, 1, {"max_moves": 1}, None, "current map"),
        (16, 1, {}, 20, "current map"),
    ],
)
def test_bad_input_is_one_line(slots, counts, config, current_slots, message):  # type: ignore[no-untyped-def]
    window = RoutingWindow(np.full((1, 16), counts, np.int64))
    current = None
    if current_slots:
        current = eplb_placement(np.ones((1, 16), np.int64), Topology(4), current_slots)
    with pytest.raises(InputError, match=message) as error:
        plan(window, Topology(4), slots, PlannerConfig(**config), current)
    assert "\n" not in str(error.value)


def test_a_plan_can_be_held_to_its_95th_percentile():
    random = np.random.default_rng(21)
    tokens = skewed_tokens(random, 4, 2048, 32, 4)
    groups = np.stack([np.bincount(layer[:, 0], minlength=32).argsort().argsort() % 4 for layer in tokens])
    order = np.argsort(groups[0][tokens[0, :, 0]] + random.normal(size=2048), kind="stable")  # topics come and go
    window, topology, slots = window_of(tokens[:, order], 32), Topology(8, 2), 32
    none = Earlier(np.empty((0, 32)), 0.0)

    def p95(rows: np.ndarray) -> np.ndarray:
        sample = zip(rows, window.counts, window.tokens, strict=True)
        return np.array([judge(row, counts, part, topology, config, none).load_p95 for row, counts, part in sample])

    config = PlannerConfig()
    free = plan(window, topology, slots, config).expert_map.physical_to_logical
    held = plan(window, topology, slots, replace(config, p95_allowance=0.0))
    eplb = p95(eplb_placement(window.counts, topology, slots).physical_to_logical)
    rows = held.expert_map.physical_to_logical
    assert (p95(free) > eplb).any()
    assert (p95(rows) <= eplb + 1e-9).all()
    assert set(held.report.fallback) <= {"", NOT_BETTER}
    for value in (-1.0, np.inf):
        with pytest.raises(InputError, match=f"p95_allowance={value} must be 0 or more, and finite"):
            PlannerConfig(p95_allowance=value)


def test_earlier_windows_cost_by_their_deviation_and_not_by_load_of_the_window():
    window = window_of(skewed_tokens(np.random.default_rng(3), 1, 1024, 16, 4), 16)
    assert window.tokens is not None
    row, topology = np.arange(16, dtype=np.int32), Topology(4)

    def judged(shares: np.ndarray, weight: float) -> Judgement:
        return judge(row, window.counts[0], window.tokens[0], topology, PlannerConfig(), Earlier(shares, weight))  # type: ignore[index]

    same = judged(window.shares()[:, :], 100.0)
    assert same.shift == pytest.approx(0, abs=1e-9) and same.objective == pytest.approx(same.cost)
    one = np.zeros((1, 16), np.float32)
    one[0, :4] = 0.25  # all on the first GPU: 4 mean loads there, none on the others
    now = window.counts[0].reshape(4, 4).sum(1) / window.counts[0].sum() * 4
    expected = 100.0 / 4 * ((np.array([4, 0, 0, 0]) - now) ** 2).mean()
    assert judged(one, 100.0).shift == pytest.approx(expected, rel=1e-6)
    assert judged(one, 0.0).objective == judged(one, 100.0).cost and judged(one, 0.0).load_p95 > 1.05
