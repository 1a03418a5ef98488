"""Which table a pass follows under ``primary``."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from sglang_eplb_affinity.dispatch.primaries import primaries_of
from sglang_eplb_affinity.dispatch.rules import choose_replicas
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.sglang_hooks.settings import Settings
from sglang_eplb_affinity.sglang_hooks.topk_step import TopkStep
from tests.sglang_hooks.arguments import server_arguments

torch = pytest.importorskip("torch")
TOPOLOGY = Topology(2)


def tables_of(slots: list[int]) -> list[torch.Tensor]:
    """Primary slots, replicas padded to the number of slots as SGLang pads them, and their numbers; int64."""
    replicas = ExpertMap(np.array([slots], np.int32), 4).logical_to_all_physical()
    primary = primaries_of(replicas, TOPOLOGY, 6)[0]
    padded = np.full((4, 6), -1, np.int64)
    padded[:, : replicas.shape[2]] = replicas[0]
    return [torch.from_numpy(a.astype(np.int64)) for a in (primary, padded, (replicas[0] >= 0).sum(1))]


@pytest.mark.parametrize("rows", [1, 3, 4, 40])
def test_small_passes_use_primary_slots(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_parallel=lambda: SimpleNamespace(moe_ep_rank=1))
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    flags = {"ep_dispatch_algorithm": "primary", "eplb_affinity_primary_tokens": 3, "moe_a2a_backend": "deepep"}
    found = Settings.of(server_arguments(**flags))
    assert (found.rule, found.table_rule, found.primary_rows) == ("cover_balanced", "primary", 3)
    assert found.planner.dispatch == "cover_balanced"
    slots = [0, 1, 2, 0, 3, 1]  # two GPUs of three; experts 0 and 1 are on both
    primary, replicas, counts = tables_of(slots)
    assert np.bincount(primary.numpy() // 3).tolist() == [2, 2]
    info = SimpleNamespace(  # SGLang's ExpertLocationDispatchInfo
        ep_dispatch_algorithm="primary",
        partial_logical_to_rank_dispatch_physical_map=primary,
        partial_logical_to_all_physical_map=replicas,
        partial_logical_to_all_physical_map_num_valid=counts,
    )
    step = TopkStep(found, SimpleNamespace(num_physical_experts=6, num_logical_experts=4), None)
    order = np.random.default_rng(0).permuted(np.tile(np.arange(4), (rows, 1)), axis=1)
    ids = torch.from_numpy(np.ascontiguousarray(order[:, :2])).int()

    def expected() -> torch.Tensor:
        rule = "primary" if rows <= 3 else "cover_balanced"
        return choose_replicas(ids, replicas[:, :3], TOPOLOGY, 6, rule, 1)

    served = ids.clone()
    assert step(0, served, None, info)
    assert (served == expected()).all()
    for table, changed in zip((primary, replicas, counts), tables_of(slots[3:] + slots[:3]), strict=True):
        table.copy_(changed)  # in place, as a rebalance changes them
    again = ids.clone()
    assert step(0, again, None, info)
    assert (again == expected()).all() and (torch.tensor(slots[3:] + slots[:3])[again.long()] == ids).all()
