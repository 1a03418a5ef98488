"""What follows from the server's arguments."""

from types import SimpleNamespace

import numpy as np
import pytest

from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape
from sglang_eplb_affinity.sglang_hooks.redundancy_advice import advice
from sglang_eplb_affinity.sglang_hooks.settings import Settings, num_groups_of
from sglang_eplb_affinity.sglang_hooks.topk_flags import default_rule, rule_text, set_default_rule
from tests.sglang_hooks.arguments import TEXT, server_arguments


@pytest.mark.parametrize(
    ("all_to_all", "mode", "objective", "normal_share"),
    [
        ("deepep", "auto", "mixed", 0.25),
        ("deepep", "normal", "normal", 1.0),
        ("deepep", "low_latency", "low_latency", 0.0),
        ("none", "auto", "normal", 1.0),
        ("deepep_v2", "auto", "v2", 1.0),
    ],
)
def test_the_objective_follows_the_deepep_mode(all_to_all, mode, objective, normal_share) -> None:
    flags = {"moe_a2a_backend": all_to_all, "deepep_mode": mode, "ep_dispatch_algorithm": "cover", "eplb_min_gain": 0.0}
    counts = np.array([[[1, 1]], [[3, 3]]])
    config = Settings.of(server_arguments(**flags)).planner
    config = config.for_window(RoutingWindow(counts.sum(0), phase_counts=counts))
    assert (config.objective, config.normal_share, config.dispatch) == (objective, normal_share, "cover")
    assert config.minimum_gain is None


def test_ours_alone() -> None:
    found = Settings.of(server_arguments())
    assert found.ours and found.records and found.chooses_replicas and found.replaces_counts and not found.own_tokens
    assert (found.rule, found.topology, found.asynchronous) == ("dynamic", Topology(2), None)
    assert found.planner.num_groups == 2 and found.planner.warm_start
    assert not found.planner_from_scratch.warm_start and found.planner_from_scratch.max_moves is None
    assert num_groups_of(None) is None


def test_eplbs_own_algorithm_beside_the_forward_passes() -> None:
    found = Settings.of(server_arguments(eplb_algorithm="deepseek", eplb_async=True, eplb_async_warm_up_passes=7))
    assert not found.ours and not found.chooses_replicas and found.replaces_counts
    assert found.asynchronous is not None and found.asynchronous.warm_up == 7


def test_the_size_of_small_passes() -> None:
    primary = {"ep_dispatch_algorithm": "primary"}  # 4 experts top-2 and 2 redundant on 2 GPUs: 8 rows a slot
    assert Settings.of(server_arguments(**primary)).primary_rows == 8 * 4 // 2
    assert Settings.of(server_arguments(**primary, moe_a2a_backend="deepep")).primary_rows == 8
    more = server_arguments(**primary, moe_a2a_backend="deepep", ep_num_redundant_experts=4)
    assert Settings.of(more).primary_rows == 16
    flags = primary | {"eplb_affinity_primary_tokens": 0}
    assert Settings.of(server_arguments(**flags)).primary_rows == 0
    assert Settings.of(server_arguments()).primary_rows == 0


def test_plans_are_held_to_the_percentile_of_the_flag() -> None:
    assert Settings.of(server_arguments()).planner.p95_allowance is None
    held = Settings.of(server_arguments(eplb_affinity_p95_allowance=0.1))
    assert held.planner.p95_allowance == held.planner_from_scratch.p95_allowance == 0.1


def test_plans_survive_what_the_flag_says() -> None:
    assert Settings.of(server_arguments()).planner.survive == "none"
    assert Settings.of(server_arguments(eplb_affinity_survive="rank")).planner_from_scratch.survive == "rank"


def test_what_more_redundant_experts_take() -> None:
    """4 experts in 2 MoE layers, 2 redundant on 2 GPUs: one slot more makes every expert on every GPU."""
    sizes = SimpleNamespace(hidden_size=1000, moe_intermediate_size=500)
    shape = MoeShape.of(SimpleNamespace(**TEXT))
    assert shape is not None
    told = advice(server_arguments(), shape, sizes)
    assert told is not None
    assert "2 redundant experts; 2 more, a slot on each GPU, take 0.006 GB" in told and "--expert-mb 3`" in told
    assert advice(server_arguments(ep_num_redundant_experts=4), shape, sizes) is None
    assert advice(server_arguments(), shape, SimpleNamespace()) is None


def test_labels_of_metrics() -> None:
    flags = {"enable_metrics": True, "extra_metric_labels": {"zone": 3}, "served_model_name": "m", "dp_size": 2}
    reports = Settings.of(server_arguments(**flags)).reports
    assert reports.labels == {"model_name": "m", "zone": "3"} and reports.own_map
    assert not Settings.of(server_arguments(**flags, enable_dp_attention=True)).reports.own_map
    assert Settings.of(server_arguments()).reports.labels is None


def test_the_phase_that_is_recorded_follows_the_role() -> None:
    for mode, phase in (("null", "both"), ("prefill", "prefill"), ("decode", "decode")):
        assert Settings.of(server_arguments(disaggregation_mode=mode)).recording.phase == phase
    assert Settings.of(server_arguments(eplb_affinity_phase="decode")).recording.phase == "decode"


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ({"moe_a2a_backend": "deepep", "deepep_mode": "normal"}, "cover_balanced"),
        ({"moe_a2a_backend": "deepep", "deepep_mode": "auto"}, "primary"),
        ({"moe_a2a_backend": "deepep", "deepep_mode": "low_latency"}, "primary"),
        ({"moe_a2a_backend": "deepep", "deepep_mode": "auto", "nnodes": 2}, "primary"),
        ({"moe_a2a_backend": "deepep", "deepep_mode": "auto", "nnodes": 2, "disaggregation_mode": "decode"}, None),
        ({"moe_a2a_backend": "deepep", "deepep_mode": "low_latency", "nnodes": 2}, None),
        ({"moe_a2a_backend": "deepep", "deepep_mode": "auto", "ep_num_redundant_experts": 0}, None),
        ({"moe_a2a_backend": "deepep", "deepep_mode": "auto", "disaggregation_mode": "decode"}, "primary"),
        ({"moe_a2a_backend": "deepep", "deepep_mode": "auto", "disaggregation_mode": "prefill"}, "cover_balanced"),
        ({"moe_a2a_backend": "deepep_v2"}, None),
        ({"moe_a2a_backend": "deepep_v2", "disaggregation_mode": "decode"}, None),
        ({"moe_a2a_backend": "deepep_v2", "disaggregation_mode": "prefill"}, "cover_balanced"),
        ({"moe_a2a_backend": "deepep_v2", "nnodes": 2}, "cover_balanced"),
        ({"moe_a2a_backend": "deepep_v2", "nnodes": 2, "eplb_affinity_nodes": 1}, None),  # one NVLink domain
        ({"moe_a2a_backend": "mooncake"}, None),
        ({"moe_a2a_backend": "deepep_v2", "nnodes": 2, "ep_num_redundant_experts": 0}, None),
    ],
)
def test_the_default_rule(flags: dict, rule: str | None) -> None:
    assert default_rule(server_arguments(**flags)) == rule


@pytest.mark.parametrize(
    ("flags", "rows", "planned"),
    [
        ({}, 8, "cover_balanced"),
        ({"nnodes": 2}, 0, "static"),
        ({"eplb_affinity_nodes": 2}, 0, "static"),
        ({"nnodes": 2, "eplb_affinity_further_slots": 1}, 8, "cover_balanced"),
        ({"nnodes": 2, "eplb_affinity_primary_tokens": 5}, 5, "cover_balanced"),
        ({"nnodes": 2, "ep_dispatch_algorithm": "primary"}, 8, "cover_balanced"),
        ({"eplb_affinity_primary_tokens": 0, "ep_dispatch_algorithm": "primary"}, 0, "cover_balanced"),
        ({"eplb_affinity_primary_tokens": 0, "deepep_mode": "low_latency"}, 0, "static"),
    ],
)
def test_over_several_nodes_auto_mode_decodes_by_static_and_prefills_by_cover(
    flags: dict, rows: int, planned: str
) -> None:
    auto = {"moe_a2a_backend": "deepep", "deepep_mode": "auto", "ep_dispatch_algorithm": None}
    args = server_arguments(**auto | flags)
    if args.ep_dispatch_algorithm is None:
        set_default_rule(args)
    found = Settings.of(args)
    assert (found.table_rule, found.primary_rows) == ("primary", rows)
    assert found.planner.even_primaries == (rows > 0)
    assert found.rule == found.planner.dispatch == planned
    assert found.planner.further_slots == (args.eplb_affinity_further_slots if rows else 0)
    static = "static" if args.deepep_mode == "low_latency" else "static in decode, cover_balanced in prefill"
    told = rule_text(args, found.shape)
    assert told == (f"primary (up to {rows} tokens of a rank; else {static})" if rows else f"primary ({static})")
