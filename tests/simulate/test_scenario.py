from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.planner import plan
from sglang_eplb_affinity.sglang_hooks.topk_flags import default_rule
from sglang_eplb_affinity.simulate.recommend import (
    Candidate,
    candidate_runs,
    decide,
    evaluate_candidates,
    gain,
    modes_of,
)
from sglang_eplb_affinity.simulate.replay import Day, Policy, domain_mix, moves, standard_policies
from sglang_eplb_affinity.simulate.scenario import (
    ALGORITHMS,
    PHASES,
    Interval,
    arms_of,
    baseline_of,
    default_arm,
    gain_pct,
    make_map,
    runs_of,
    served_rule,
    simulate,
    with_mode,
    with_overlap,
)
from sglang_eplb_affinity.simulate.source import RoutingSource
from sglang_eplb_affinity.simulate.system import DeepEPMode
from sglang_eplb_affinity.simulate.v2_comparison import compare_v2, comparison_runs
from tests.sglang_hooks.arguments import server_arguments
from tests.simulate.conftest import make_trace


@pytest.fixture
def results(system, source):
    return simulate(system, source, [("prefill", 512), ("decode", 64)], ALGORITHMS, resamples=3)


def test_every_arm_and_phase_is_reported_and_adds_up(system, results):
    affinity = [(r.phase, r.dispatch_rule) for r in results if r.algorithm == "affinity"]
    assert affinity == [("prefill", "cover_balanced"), ("decode", "static")]  # 64 tokens are no small pass
    assert len(results) == 6
    for r in results:
        assert 0 < r.active_slots <= system.num_slots / system.cluster.gpus
        layer_us = r.dispatch_us.value + r.experts_us.value + r.combine_us.value + r.rest_us.value
        assert r.step_ms.value == pytest.approx(system.model.moe_layers * layer_us / 1e3)
        assert r.step_ms.lower <= r.step_ms.value <= r.step_ms.upper
        assert r.tokens_per_second_per_gpu == pytest.approx(r.tokens_per_gpu / r.step_ms.value * 1e3)
        assert set(r.slowest) == {"dispatch", "experts", "combine"}


def test_affinity_cuts_fanout_and_prefill_time_where_tokens_have_affinity(results):
    eplb, affinity = (r for r in results if r.phase == "prefill" and r.algorithm != "none")
    assert affinity.gpu_fanout < 0.95 * eplb.gpu_fanout
    assert affinity.dispatch_us.value < eplb.dispatch_us.value
    assert gain_pct(affinity, eplb).value > 0
    assert baseline_of(results, affinity, "eplb") is eplb


def test_primary_has_one_active_slot_an_expert_in_small_passes_only(system, source):
    wide = dataclasses.replace(system, serving=dataclasses.replace(system.serving, redundant_experts=16))
    rules = ("static", "primary")
    static, primary = simulate(wide, source, [("decode", 8)], ["affinity"], resamples=2, rules=rules)
    assert primary.active_slots == 16 / system.cluster.gpus < static.active_slots
    assert primary.experts_us.value < static.experts_us.value
    assert runs_of(wide, [("decode", 8)], ["eplb", "affinity"], 2) == 9
    assert runs_of(wide, [("decode", 9)], ["eplb", "affinity"], 2) == 6


def test_same_input_gives_same_output(system, source, results):
    again = simulate(system, source, [("prefill", 512), ("decode", 64)], ALGORITHMS, resamples=3)
    assert [r.step_ms for r in again] == [r.step_ms for r in results]


def test_two_batch_overlap_is_never_better_than_hiding_everything(system, source):
    hidden = simulate(with_overlap(system, "two_batch"), source, [("prefill", 512)], ["eplb"], resamples=2)[0]
    plain = simulate(system, source, [("prefill", 512)], ["eplb"], resamples=2)[0]
    busiest = max(plain.experts_us.value + plain.rest_us.value, plain.dispatch_us.value + plain.combine_us.value)
    assert busiest * system.model.moe_layers / 1e3 * 0.99 <= hidden.step_ms.value <= plain.step_ms.value * 1.3


def test_one_batch_is_no_interval(system, source):
    with pytest.raises(InputError, match="--resamples 1"):
        simulate(system, source, [("decode", 8)], ["eplb"], resamples=1)


def random_trace(experts: int = 16) -> RoutingTrace:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((4096, 3, experts)), axis=2)[:, :, :4].astype(np.int16)
    return RoutingTrace(ids, experts, (np.arange(4096) // 64).astype(np.int32), source="random.npz")


def test_recommend_leaves_it_where_nothing_can_be_gained(system):
    source = RoutingSource(random_trace(), None, system.model, np.arange(3))
    for phase, tokens in (("prefill", 512), ("decode", 64)):
        answer = decide(phase, evaluate_candidates(system, source, phase, tokens, 3), 1.0)
        assert not answer.enable
        assert answer.chosen.result.algorithm == "none"
        assert any("even already" in reason for reason in answer.reasons)


def test_recommend_enables_what_gains(system, source):
    answer = decide("prefill", evaluate_candidates(system, source, "prefill", 512, 3), 1.0)
    assert answer.enable
    assert answer.over_none.lower >= 1.0
    assert answer.to_json()["algorithm"] in ("eplb", "affinity")


def made(algorithm, step_ms, results):
    """A candidate of that algorithm whose every batch takes so long, with no calibration error."""
    like = next(r for r in results if r.phase == "prefill" and r.algorithm == algorithm)
    still = Interval(0.0, 0.0, 0.0)
    return Candidate(replace(like, step_ms_samples=(step_ms,) * 3, dispatch_us=still, combine_us=still), 3, 0.0)


def test_the_comparison_that_decides_is_printed(results):
    cases = {  # step times of no EPLB, EPLB and affinity; what is chosen, and what must be said
        (100.0, 104.0, 100.2): ("none", "but affinity against no EPLB: -0.2 %"),
        (100.0, 90.0, 89.5): ("eplb", "affinity against EPLB: +0.6 % [+0.6, +0.6]; not surely 1 % or more"),
        (100.0, 99.5, 99.3): ("none", "EPLB against no EPLB: +0.5 %"),
        (100.0, 97.0, 94.0): ("affinity", "GPU fan-out"),
    }
    for times, (chosen, said) in cases.items():
        candidates = [made(*pair, results) for pair in zip(ALGORITHMS, times, strict=True)]
        answer = decide("prefill", candidates, 1.0)
        assert answer.chosen.result.algorithm == chosen
        assert any(said in reason for reason in answer.reasons), (said, answer.reasons)


@pytest.mark.parametrize("layers", [1, 2])
def test_routing_of_other_layers_is_not_called_the_models(system, layers):
    trace = make_trace(layers=layers)
    label = RoutingSource(trace, None, system.model, np.arange(3)).label
    assert f"another model or of some layers (made.npz: {layers} layers), stretched over 3 MoE layers" in label
    assert RoutingSource(make_trace(), None, system.model, np.arange(3)).label == "recorded routing (made.npz)"


def test_rules_and_passes_of_recommend_and_day(system, source):
    """Affinity under each rule against the same EPLB; all judged on passes, of which small ones are less even."""
    sized = replace(system, serving=replace(system.serving, redundant_experts=8))
    rules = ("cover", "cover_balanced")
    large, small = (evaluate_candidates(sized, source, "prefill", n, 2, None, [8], rules) for n in (512, 1))
    for found in (large, small):
        assert [c.result.algorithm for c in found] == ["none", "eplb", "affinity", "affinity"]
        assert [c.result.dispatch_rule for c in found] == ["static", "static", *rules]
    assert small[1].result.load_max_over_mean > large[1].result.load_max_over_mean > 1
    assert large[2].result.load_max_over_mean != large[3].result.load_max_over_mean
    entry = decide("prefill", large, 0.0).to_json()
    assert entry["pass_tokens"] == 512 and entry["pass_load_max_over_mean"] > 1
    loads = {}
    for tokens, rule in ((1, "cover"), (512, "cover"), (512, "cover_balanced")):
        day = Day(sized, source, windows=4, tokens_per_gpu=tokens, plan_tokens=1024)
        loads[tokens, rule] = day.run([Policy("affinity", -1, rule=rule)])[0].mean("pass_load_max_over_mean")
    assert loads[1, "cover"] > loads[512, "cover"] > 1 and loads[512, "cover"] != loads[512, "cover_balanced"]


def test_primary_is_served_in_small_passes_only(system):
    assert served_rule("primary", system, 1, "low_latency") == "static"  # without replicas the two are the same
    system = replace(
        system, serving=replace(system.serving, redundant_experts=8)
    )  # a slot of each GPU: 8 rows an expert
    for mode, large in (("normal", "cover_balanced"), ("low_latency", "static"), ("v2", "cover_balanced")):
        assert [served_rule("primary", system, n, mode) for n in (4, 5)] == ["primary", large]
    assert served_rule("cover", system, 4096, "low_latency") == "cover"


def test_gain_interval_includes_the_calibration_error(results):
    eplb, affinity = (r for r in results if r.phase == "prefill" and r.algorithm != "none")
    a, e = Candidate(affinity, 3, 0.0), Candidate(eplb, 3, 0.0)
    wide, narrow = gain(a, e), gain_pct(affinity, eplb)
    assert wide.lower <= narrow.lower and wide.upper >= narrow.upper
    assert gain(e, e) == Interval(0.0, 0.0, 0.0)


def test_policy_is_due_on_its_windows():
    assert [w for w in range(8) if Policy("vanilla", 3).due(w)] == [3, 6]
    assert [w for w in range(8) if Policy("vanilla", -1).due(w)] == [1]
    assert not any(Policy("none", 0).due(w) for w in range(8))


def test_domains_take_turns():
    mixes = np.array([domain_mix(hour, 3) for hour in range(24)])
    np.testing.assert_allclose(mixes.sum(1), 1.0)
    assert len(set(mixes.argmax(1).tolist())) == 3


def test_day_moves_nothing_without_eplb_and_keeps_the_move_cap(system, source):
    day = Day(system, source, windows=6, tokens_per_gpu=128, plan_tokens=1024)
    results = {r.policy.name: r for r in day.run(standard_policies([1], 1, 0.0, 1))}
    assert results["none"].total("moved_experts") == 0 and results["none"].total("stall_s") == 0
    for name in ("vanilla", "affinity"):
        assert results[name].total("moved_experts") > 0 and results[name].total("stall_s") > 0
    capped = results["affinity-async"]
    assert capped.total("stall_s") == 0
    # One expert for each GPU and layer and round at most.
    assert max(w.moved_experts for w in capped.windows) <= 8 * 3
    assert results["vanilla"].mean("balancedness") > results["none"].mean("balancedness")


def test_plans_of_a_day_heed_the_last_rounds_as_a_servers_do(system, source, monkeypatch):
    heeded = []

    def seen(window, *arguments):
        heeded.append(0 if window.earlier is None else len(window.earlier))
        return plan(window, *arguments)

    monkeypatch.setattr("sglang_eplb_affinity.simulate.replay.plan", seen)
    day = Day(system, source, windows=7, tokens_per_gpu=128, plan_tokens=1024)
    day.run([Policy("affinity", 1), Policy("affinity", 3)])
    # The first round's window is both policies'; the second policy has one more, three windows later.
    assert heeded == [0, 1, 2, 0, 3, 3, 3, 1]


def test_day_needs_domains(system, trace):
    plain = dataclasses.replace(trace, domain=None)
    with pytest.raises(InputError, match="domain"):
        Day(system, RoutingSource(plain, None, system.model, np.arange(3)))


def test_moves_counts_new_experts_by_gpu(system, source):
    window = source.plan_window()
    a = make_map(default_arm("none", system, "prefill"), window, system, "normal")
    b = make_map(default_arm("eplb", system, "prefill"), window, system, "normal")
    total, busiest = moves(a, b, 8)
    assert 0 < busiest <= total
    assert moves(a, a, 8) == (0, 0)


def test_decode_modes_are_compared_within_a_node_only(system):
    one_node = dataclasses.replace(system, cluster=dataclasses.replace(system.cluster, gpus=4, gpus_per_node=4))
    assert modes_of(one_node, "decode") == ("low_latency", "normal")
    assert modes_of(system, "decode") == ("low_latency",)
    assert modes_of(system, "prefill") == ("normal",)
    v2 = dataclasses.replace(one_node, serving=dataclasses.replace(one_node.serving, decode_mode="v2"))
    assert modes_of(v2, "decode") == ("v2",)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("mode", get_args(DeepEPMode))
def test_affinity_takes_the_rule_of_a_server_of_the_phase(system, mode, nodes, phase):
    sized = replace(system, cluster=replace(system.cluster, gpus_per_node=system.cluster.gpus // nodes))
    arms = arms_of(["eplb", "affinity"], with_mode(sized, phase, mode), phase)
    flags = {"moe_a2a_backend": "deepep", "deepep_mode": mode} if mode != "v2" else {"moe_a2a_backend": "deepep_v2"}
    served = default_rule(server_arguments(**flags, nnodes=nodes, disaggregation_mode=phase))
    pays = mode == "normal" or (mode == "v2" and (nodes == 2 or phase == "prefill"))
    one_slot = mode == "low_latency" and nodes == 1
    assert served == ("cover_balanced" if pays else "primary" if one_slot else None)
    ours = ["cover_balanced"] if pays else ["primary", "static"] if one_slot else ["static", "primary"]
    assert [arm.rule for arm in arms] == ["static", *ours]


def test_v2_pays_for_fanout_in_decode(system, source):
    v1 = simulate(system, source, [("decode", 64)], ["eplb", "affinity"], resamples=2)
    v2 = dataclasses.replace(system, serving=dataclasses.replace(system.serving, decode_mode="v2"))
    eplb, affinity = simulate(v2, source, [("decode", 64)], ["eplb", "affinity"], resamples=2)
    assert (eplb.dispatch_rule, affinity.dispatch_rule, affinity.mode) == ("static", "cover_balanced", "v2")
    assert v1[1].dispatch_rule == "static"
    assert affinity.gpu_fanout < 0.95 * eplb.gpu_fanout
    assert affinity.dispatch_us.value < eplb.dispatch_us.value
    assert affinity.combine_us.value < eplb.combine_us.value
    with pytest.raises(InputError, match=r"serving\.overlap is 'two_batch', but must be none with mode v2"):
        with_overlap(v2, "two_batch")


@pytest.mark.parametrize("tokens", [4, 5])  # the largest small pass, and one in which `primary` is `static`
def test_progress_counts_the_candidates_that_there_are(system, source, tokens):
    reported: list[int] = []
    found = evaluate_candidates(system, source, "decode", tokens, 2, reported.append, [0, 8])
    # Without replicas the two are the same.
    assert [c.result.dispatch_rule for c in found] == ["static"] * 6 + ["primary"] * (5 - tokens)
    assert sum(reported) == candidate_runs(system, "decode", tokens, 2, [0, 8])


def test_v2_is_compared_on_the_same_batches(system, source):
    candidates = evaluate_candidates(system, source, "decode", 64, 2, redundancies=[0])
    v1 = min(candidates, key=lambda c: float(c.step_ms().mean()))
    reported: list[int] = []
    found = compare_v2(system, source, v1, 64, 2, reported.append, [0])
    assert sum(reported) == comparison_runs(system, 64, 2, [0])
    assert {found.eplb.result.mode, found.affinity.result.mode} == {"v2"} and found.v1 is v1
    assert found.over_eplb == gain(found.affinity, found.eplb) and found.over_v1 == gain(found.affinity, v1)
    assert "assumed beyond" in found.to_json()["constants"] and "assumed beyond" in found.text
