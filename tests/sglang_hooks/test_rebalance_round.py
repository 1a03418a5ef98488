"""One rebalance without a server: what is skipped, what fails, and what the log line says."""

import json
import logging
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_eplb_affinity.dispatch.rules import choose_replicas
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology

LAYERS, EXPERTS, SLOTS = 2, 8, 12


@pytest.fixture
def make_round(monkeypatch: pytest.MonkeyPatch):
    from sglang_eplb_affinity.sglang_hooks import rebalance
    from sglang_eplb_affinity.sglang_hooks.recording import RecordedWindow

    ids = torch.from_numpy(ExpertMap.contiguous(LAYERS, EXPERTS, SLOTS).physical_to_logical.astype(np.int64))
    metadata = SimpleNamespace(
        physical_to_logical_map=ids, physical_to_logical_map_cpu=ids, num_logical_experts=EXPERTS, ep_size=4
    )
    # SGLang itself imports on a machine without a GPU only beside the CPU engine's stand-ins.
    module = ModuleType("sglang.srt.eplb.expert_location")
    monkeypatch.setattr(module, "get_global_expert_location_metadata", lambda: metadata, raising=False)
    for name in ("sglang", "sglang.srt", "sglang.srt.eplb"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        rebalance.RebalanceRound, "_metadata_of", lambda self, planned: ("metadata of", planned.physical_to_logical)
    )
    arguments = SimpleNamespace(
        eplb_algorithm="affinity",
        eplb_affinity_nodes=2,
        eplb_affinity_max_load_increase=0.01,
        eplb_affinity_incremental=False,
        eplb_affinity_max_moves=None,
        eplb_min_gain=0.02,
        nnodes=1,
        moe_a2a_backend="none",
        deepep_mode="auto",
        ep_dispatch_algorithm="dynamic",
        init_expert_location="trivial",
    )

    monkeypatch.setattr(rebalance, "adapter", lambda: SimpleNamespace(arguments=lambda: arguments))

    def make(window: RoutingWindow) -> rebalance.RebalanceRound:
        weights = {layer: [torch.zeros(SLOTS // 4, 5, 2), torch.zeros(SLOTS // 4, 3)] for layer in range(LAYERS)}
        model = SimpleNamespace(routed_experts_weights_of_layer=weights)
        manager = SimpleNamespace(_get_model=lambda: model)
        found = rebalance.begin(manager, RecordedWindow(window))
        assert found is not None
        return found

    return make


def some_window() -> RoutingWindow:
    random = np.random.default_rng(0)
    ids = np.stack([random.permutation(EXPERTS)[:3] for _ in range(400 * LAYERS)]).reshape(400, LAYERS, 3)
    ids[:200, :, 0], ids[:200, :, 1], ids[:200, :, 2] = 0, 5, 7  # half of the tokens choose the same three
    return RoutingWindow.from_trace(RoutingTrace(ids.astype(np.int16), EXPERTS))


def record(caplog: pytest.LogCaptureFixture) -> dict:
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("[eplb-affinity] rebalance {")]
    return dict(json.loads(line.split("rebalance ", 1)[1]))


def test_an_empty_window_keeps_the_map(make_round, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    empty = RoutingWindow(
        np.zeros((LAYERS, EXPERTS), np.int64),
        np.zeros((LAYERS, EXPERTS, EXPERTS), np.int64),
        np.full((LAYERS, 16, 3), -1, np.int16),
    )
    assert make_round(empty).plan() is None
    assert record(caplog)["result"] == "skipped" and record(caplog)["reason"] == "no tokens recorded"


def test_a_failing_planner_keeps_the_map(make_round, caplog, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_eplb_affinity.sglang_hooks import rebalance

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(rebalance, "plan", fail)
    caplog.set_level(logging.INFO)
    assert make_round(some_window()).plan() is None
    assert record(caplog)["result"] == "failed" and record(caplog)["reason"] == "RuntimeError: planted"


def test_a_plan_becomes_metadata_and_the_line_has_both_maps(make_round, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = make_round(some_window())
    planned = found.plan()
    assert planned is not None
    ids = torch.from_numpy(planned[1].astype(np.int64))
    found.finish(SimpleNamespace(physical_to_logical_map_cpu=ids, num_logical_experts=EXPERTS))
    line = record(caplog)
    assert line["result"] == "applied" and line["moved_experts"] > 0 and line["round"] == 1
    assert line["tokens"] == 400 * 3
    assert line["moved_bytes"] == line["moved_experts"] * (5 * 2 + 3) * 4
    assert line["gpu_fanout_contiguous"] == line["gpu_fanout_before"]
    assert all(1 <= line[f"gpu_fanout_{when}"] <= 3 for when in ("before", "after"))
    assert 0 < line["balancedness_before"] <= line["balancedness_after"] <= 1


def test_a_map_that_is_good_enough_stays(make_round, caplog: pytest.LogCaptureFixture) -> None:
    first = make_round(some_window()).plan()
    found = make_round(some_window())
    found._before = ExpertMap(first[1], EXPERTS)
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert found.plan() is None
    line = record(caplog)
    assert (line["result"], line["moved_experts"]) == ("unchanged", 0)
    assert line["reason"] == "no layer gains 2.00%"


@pytest.mark.parametrize("rule", ["static", "cover"])
def test_sglang_serves_by_the_static_table_that_was_planned_with(make_round, monkeypatch, rule: str) -> None:
    from sglang_eplb_affinity.sglang_hooks import rebalance

    location = sys.modules["sglang.srt.eplb.expert_location"]
    monkeypatch.setattr(location, "ExpertLocationMetadata", SimpleNamespace, raising=False)
    topology = Topology(4, 2)
    slots = np.random.default_rng(3).permuted(np.tile(np.arange(SLOTS) % EXPERTS, (LAYERS, 1)), axis=1)
    expert_map = ExpertMap(slots.astype(np.int32), EXPERTS)
    table = expert_map.logical_to_all_physical()
    for rank in range(4):
        found = rebalance.metadata_of(expert_map, topology, rule, "cpu", rank)
        assert found.logical_to_all_physical_map.shape == (LAYERS, EXPERTS, SLOTS) and found.ep_size == 4
        assert (found.logical_to_all_physical_map_num_valid.numpy() == expert_map.replica_counts()).all()
        if rule != "static":
            assert found.logical_to_rank_dispatch_physical_map is None
            continue
        for layer in range(LAYERS):
            ids = torch.arange(EXPERTS)[None]
            expected = choose_replicas(ids, torch.from_numpy(table[layer]), topology, SLOTS, "static", rank)
            assert (found.logical_to_rank_dispatch_physical_map[layer] == expected[0]).all()


def test_layers_without_experts_do_not_count_as_moved(make_round, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = make_round(some_window())
    del found._manager._get_model().routed_experts_weights_of_layer[0]
    swapped = ExpertMap.contiguous(LAYERS, EXPERTS, SLOTS).physical_to_logical[:, ::-1].astype(np.int64)
    ids = torch.from_numpy(swapped.copy())
    found.finish(SimpleNamespace(physical_to_logical_map_cpu=ids, num_logical_experts=EXPERTS))
    line = record(caplog)
    assert line["moved_layers"] == 1 and 0 < line["moved_experts"] <= SLOTS
    assert line["moved_bytes"] == line["moved_experts"] * (5 * 2 + 3) * 4


def test_without_a_record_there_is_no_round() -> None:
    from sglang_eplb_affinity.sglang_hooks import rebalance

    assert rebalance.begin(SimpleNamespace(), None) is None


def test_load_record_shares_an_experts_tokens_among_its_replicas() -> None:
    from sglang_eplb_affinity.sglang_hooks.load_log import load_record

    expert_map = ExpertMap(np.array([[0, 1, 2, 0], [0, 1, 2, 1]]), 3)
    line = load_record(np.array([[6, 1, 1], [0, 0, 0]]), expert_map, 2)
    assert line["layers"] == 1 and line["gpu_tokens"] == [4.0, 4.0] and line["expert_tokens"] == [6, 1, 1]
    assert line["gpu_max_over_mean"] == 1.0 and line["expert_max_over_mean"] == 2.25


@pytest.mark.parametrize(
    ("all_to_all", "mode", "objective", "normal_share"),
    [
        ("deepep", "auto", "mixed", 0.25),
        ("deepep", "normal", "normal", 1.0),
        ("deepep", "low_latency", "low_latency", 0.0),
        ("none", "auto", "normal", 1.0),
    ],
)
def test_the_objective_follows_the_deepep_mode(all_to_all, mode, objective, normal_share) -> None:
    arguments = SimpleNamespace(
        moe_a2a_backend=all_to_all,
        deepep_mode=mode,
        eplb_affinity_max_load_increase=0.0,
        ep_dispatch_algorithm="cover",
        eplb_affinity_incremental=False,
        eplb_affinity_max_moves=None,
        eplb_min_gain=0.0,
    )
    from sglang_eplb_affinity.sglang_hooks.rebalance import planner_config

    counts = np.array([[[1, 1]], [[3, 3]]])
    config = planner_config(arguments).for_window(RoutingWindow(counts.sum(0), phase_counts=counts))
    assert (config.objective, config.normal_share, config.dispatch) == (objective, normal_share, "cover")
    assert config.minimum_gain is None


def test_the_planner_is_told_the_models_expert_groups(make_round) -> None:
    from sglang_eplb_affinity.sglang_hooks import rebalance
    from sglang_eplb_affinity.sglang_hooks.recording import RecordedWindow

    model = SimpleNamespace(hf_config=SimpleNamespace(n_group=4))
    assert rebalance.num_groups_of(model) == 4
    assert rebalance.num_groups_of(SimpleNamespace(hf_config=SimpleNamespace())) is None
    assert rebalance.num_groups_of(None) is None
    arguments = make_round(some_window())._server_args
    found = rebalance.begin(SimpleNamespace(_model_config=model), RecordedWindow(some_window()))
    assert found is not None and found._num_groups == 4
    assert rebalance.planner_config(arguments, num_groups=4).num_groups == 4
