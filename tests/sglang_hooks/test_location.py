"""SGLang's metadata of our maps, and the load log's figures, without a server."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_eplb_affinity.dispatch.rules import choose_replicas
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.sglang_hooks.load_log import load_record
from sglang_eplb_affinity.sglang_hooks.location import map_of, metadata_of

LAYERS, EXPERTS, SLOTS = 2, 8, 12


@pytest.mark.parametrize(("rule", "further"), [("static", 0), ("cover", 0), ("primary", 0), ("primary", 1)])
def test_sglang_serves_by_the_static_table_that_was_planned_with(monkeypatch, rule: str, further: int) -> None:
    # SGLang itself imports on a machine without a GPU only beside the CPU engine's stand-ins.
    location = ModuleType("sglang.srt.eplb.expert_location")
    monkeypatch.setattr(location, "ExpertLocationMetadata", SimpleNamespace, raising=False)
    for name in ("sglang", "sglang.srt", "sglang.srt.eplb"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, location.__name__, location)
    topology = Topology(4, 2)
    slots = np.random.default_rng(3).permuted(np.tile(np.arange(SLOTS) % EXPERTS, (LAYERS, 1)), axis=1)
    expert_map = ExpertMap(slots.astype(np.int32), EXPERTS)
    table = expert_map.logical_to_all_physical()
    for rank in range(4):
        found = metadata_of(expert_map, topology, rule, "cpu", rank, further_slots=further)
        found.num_logical_experts = EXPERTS
        assert (map_of(found).physical_to_logical == slots).all()
        assert found.logical_to_all_physical_map.shape == (LAYERS, EXPERTS, SLOTS) and found.ep_size == 4
        assert (found.logical_to_all_physical_map_num_valid.numpy() == expert_map.replica_counts()).all()
        if rule == "cover":
            assert found.logical_to_rank_dispatch_physical_map is None
            continue
        halves = ("static",) if rule == "static" else ("primary", "static")
        for layer in range(LAYERS):
            ids = torch.arange(EXPERTS)[None]
            replicas = torch.from_numpy(table[layer])
            expected = [
                choose_replicas(ids, replicas, topology, SLOTS, half, rank, further_slots=further)[0] for half in halves
            ]
            assert (found.logical_to_rank_dispatch_physical_map[layer] == torch.cat(expected)).all()


def test_load_record_shares_an_experts_tokens_among_its_replicas() -> None:
    expert_map = ExpertMap(np.array([[0, 1, 2, 0], [0, 1, 2, 1]]), 3)
    line = load_record(np.array([[6, 1, 1], [0, 0, 0]]), expert_map, 2)
    assert line["layers"] == 1 and line["gpu_tokens"] == [4.0, 4.0] and line["expert_tokens"] == [6, 1, 1]
    assert line["gpu_max_over_mean"] == 1.0 and line["expert_max_over_mean"] == 2.25
