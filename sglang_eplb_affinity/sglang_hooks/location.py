"""Between this package's expert maps and SGLang's ExpertLocationMetadata."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.living_ranks import LivingRanks
from sglang_eplb_affinity.rebalance.layer_moves import rank_table


def metadata_of(
    expert_map: ExpertMap, topology: Topology, rule: DispatchRule, device: Any, ep_rank: int | None = None,
    living: LivingRanks | None = None, further_slots: int = 0,
) -> Any:  # fmt: skip
    """SGLang's ExpertLocationMetadata with all replicas of each expert.

    ``ep_rank`` None: the global rank modulo EP size, as SGLang's own rebalance has it. Under ``static`` the replica
    that this rank uses is the one that the planner counted with; under ``primary`` its table is that of rank_table.
    SGLang's own table is another draw, knows no emulated nodes, and is filled by a Python loop over ranks, layers and
    experts while every rank waits. ``living``: ``expert_map`` is of living ranks, the tables are of all slots and name
    none of a rank that is gone; nodes are those of the living.
    """
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata

    rank = dist.get_rank() % topology.num_gpus if ep_rank is None and rule in ("static", "primary") else ep_rank
    rows, table = expert_map.physical_to_logical, expert_map.logical_to_all_physical()
    chosen = _chosen_slots(
        table, topology if living is None else living.topology, expert_map.num_slots, rule, rank, living,
        further_slots,
    )  # fmt: skip
    if living is not None:
        rows = living.whole_rows(expert_map)
        table = living.whole_slots(table, rows.shape[1])
        chosen = None if chosen is None else living.whole_slots(chosen, rows.shape[1])
    slots = torch.from_numpy(rows.astype(np.int64))
    padded = np.full((*table.shape[:2], rows.shape[1]), -1, np.int64)
    padded[:, :, : table.shape[2]] = table
    replicas = torch.from_numpy(padded)
    static = None if chosen is None else torch.from_numpy(chosen.astype(np.int64)).to(device)
    return ExpertLocationMetadata(
        physical_to_logical_map=slots.to(device),
        physical_to_logical_map_cpu=slots,
        logical_to_all_physical_map=replicas.to(device),
        logical_to_all_physical_map_cpu=replicas,
        logical_to_all_physical_map_num_valid=torch.from_numpy((table >= 0).sum(2)).to(device),
        ep_size=topology.num_gpus,
        logical_to_rank_dispatch_physical_map=static,
    )


def _chosen_slots(
    table: np.ndarray, topology: Topology, num_slots: int, rule: DispatchRule, rank: int | None,
    living: LivingRanks | None, further_slots: int,
) -> np.ndarray | None:  # fmt: skip
    """int32 [layers, columns]: what this rank looks up under ``static`` and ``primary``; None under others."""
    if rule not in ("static", "primary"):
        return None
    assert rank is not None
    own = rank if living is None else int(np.searchsorted(living.ranks, rank))
    tables = (rank_table(layer, topology, num_slots, rule, further_slots) for layer in table)
    return np.stack([of_layer[own] for of_layer in tables if of_layer is not None])


def with_primaries(metadata: Any, topology: Topology, further_slots: int, ep_rank: int | None = None) -> Any:
    """SGLang's own metadata, with ``primary``'s table of this rank where it has that of ``static``."""
    if metadata.logical_to_rank_dispatch_physical_map is None:
        rank = dist.get_rank() % topology.num_gpus if ep_rank is None else ep_rank
        replicas = map_of(metadata).logical_to_all_physical()
        table = _chosen_slots(replicas, topology, metadata.num_physical_experts, "primary", rank, None, further_slots)
        assert table is not None
        device = metadata.physical_to_logical_map.device
        metadata.logical_to_rank_dispatch_physical_map = torch.from_numpy(table.astype(np.int64)).to(device)
    return metadata


def map_of(metadata: Any) -> ExpertMap:
    return ExpertMap(metadata.physical_to_logical_map_cpu.numpy().astype(np.int32), metadata.num_logical_experts)
