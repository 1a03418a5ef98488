"""Which table a pass follows under ``primary``."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from sglang_eplb_affinity.dispatch.rules import DispatchRule, choose_replicas
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.rebalance.layer_moves import rank_table
from sglang_eplb_affinity.sglang_hooks.settings import Settings
from sglang_eplb_affinity.sglang_hooks.topk_step import TopkStep
from tests.sglang_hooks.arguments import server_arguments

torch = pytest.importorskip("torch")
TOPOLOGY = Topology(2)


def tables_of(slots: list[int], further: int) -> list[torch.Tensor]:
    """Rank 1's table of ``primary`` (active slots, then those of ``static``), replicas padded to the number of slots
    as SGLang pads them, and their numbers; int64."""
    replicas = ExpertMap(np.array([slots], np.int32), 4).logical_to_all_physical()
    looked_up = rank_table(replicas[0], TOPOLOGY, 6, "primary", further)
    assert looked_up is not None and looked_up.shape == (2, 8)
    padded = np.full((4, 6), -1, np.int64)
    padded[:, : replicas.shape[2]] = replicas[0]
    return [torch.from_numpy(a.astype(np.int64)) for a in (looked_up[1], padded, (replicas[0] >= 0).sum(1))]


@pytest.mark.parametrize("further", [0, 1])
@pytest.mark.parametrize("rows", [1, 3, 4, 40])
@pytest.mark.parametrize(
    ("mode", "extends", "large"),
    [
        ("normal", True, "cover_balanced"),
        ("low_latency", True, "static"),
        ("auto", True, "cover_balanced"),
        ("auto", False, "static"),  # decode, in low-latency mode
    ],
)
def test_which_table_a_pass_follows(
    rows: int, mode: str, extends: bool, large: str, further: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(get_parallel=lambda: SimpleNamespace(moe_ep_rank=1))
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    attention = SimpleNamespace(get_is_extend_in_batch=lambda: extends)
    monkeypatch.setitem(sys.modules, "sglang.srt.layers.dp_attention", attention)
    flags = {"ep_dispatch_algorithm": "primary", "eplb_affinity_primary_tokens": 3, "moe_a2a_backend": "deepep"}
    flags |= {"eplb_affinity_further_slots": further, "ep_num_redundant_experts": 2}
    found = Settings.of(server_arguments(**flags, deepep_mode=mode))
    assert (found.rule, found.table_rule, found.primary_rows) == ("cover_balanced", "primary", 3)
    assert (found.planner.dispatch, found.planner.further_slots) == ("cover_balanced", further)
    slots = [0, 1, 2, 0, 3, 1]  # two GPUs of three; experts 0 and 1 are on both
    looked_up, replicas, counts = tables_of(slots, further)
    assert np.bincount(looked_up.numpy()[:4] // 3).tolist() == [2 - further, 2 + further]  # both of its own, or not
    info = SimpleNamespace(  # SGLang's ExpertLocationDispatchInfo
        ep_dispatch_algorithm="primary",
        partial_logical_to_rank_dispatch_physical_map=looked_up,
        partial_logical_to_all_physical_map=replicas,
        partial_logical_to_all_physical_map_num_valid=counts,
    )
    step = TopkStep(found, SimpleNamespace(num_physical_experts=6, num_logical_experts=4), None)
    order = np.random.default_rng(0).permuted(np.tile(np.arange(4), (rows, 1)), axis=1)
    ids = torch.from_numpy(np.ascontiguousarray(order[:, :2])).int()

    def expected() -> torch.Tensor:
        rule: DispatchRule = "primary" if rows <= 3 else large  # type: ignore[assignment]
        return choose_replicas(ids, replicas[:, :3], TOPOLOGY, 6, rule, 1, further_slots=further)

    served = ids.clone()
    assert step(0, served, None, info)
    assert (served == expected()).all()
    for table, changed in zip((looked_up, replicas, counts), tables_of(slots[3:] + slots[:3], further), strict=True):
        table.copy_(changed)  # in place, as a rebalance changes them
    again = ids.clone()
    assert step(0, again, None, info)
    assert (again == expected()).all() and (torch.tensor(slots[3:] + slots[:3])[again.long()] == ids).all()
