"""EPLB's placement: replicate the hottest experts, then pack by load. The baseline, the starting point, the fallback.

Written from the published description of DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB, which SGLang copies as
``deepseek`` and ``deepseek_hierarchical``): replicas go one by one to the expert with the largest load per replica;
packing gives the heaviest item to the least loaded pack that has room. Ties are broken by the lower index, so equal
input gives equal maps everywhere; SGLang's sort is unstable, so only untied loads give the same map as SGLang's.
"""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.domain.topology import Topology


@kernel
def _pack(weight, num_packs, pack_of, rank_in_pack):  # type: ignore[no-untyped-def]
    """Packs of equal size and near-equal weight. weight float32 [n]; writes pack_of and rank_in_pack int64 [n]."""
    n = weight.shape[0]
    room = n // num_packs
    if room == 1:
        for i in range(n):
            pack_of[i] = i
            rank_in_pack[i] = 0
        return
    order = np.argsort(-weight, kind="mergesort")
    load = np.zeros(num_packs, np.float64)
    items = np.zeros(num_packs, np.int64)
    for item in order:
        best = -1
        for pack in range(num_packs):
            if items[pack] < room and (best < 0 or load[pack] < load[best]):
                best = pack
        pack_of[item] = best
        rank_in_pack[item] = items[best]
        load[best] += weight[item]
        items[best] += 1


@kernel
def _place_layer(weight, num_slots, num_groups, num_nodes, num_gpus, out):  # type: ignore[no-untyped-def]
    """One layer. weight float32 [experts]; writes out int32 [slots], the expert of each slot."""
    experts = weight.shape[0]
    group_size = experts // num_groups
    group_weight = np.zeros(num_groups, np.float32)
    for e in range(experts):
        group_weight[e // group_size] += weight[e]
    group_node = np.empty(num_groups, np.int64)
    group_rank = np.empty(num_groups, np.int64)
    _pack(group_weight, num_nodes, group_node, group_rank)

    per_node = experts // num_nodes
    node_expert = np.empty((num_nodes, per_node), np.int64)
    for e in range(experts):
        group = e // group_size
        node_expert[group_node[group], group_rank[group] * group_size + e % group_size] = e

    slots = num_slots // num_nodes
    gpus = num_gpus // num_nodes
    slots_per_gpu = num_slots // num_gpus
    local = np.empty(slots, np.int64)
    item_weight = np.empty(slots, np.float32)
    gpu_of = np.empty(slots, np.int64)
    rank_of = np.empty(slots, np.int64)
    for node in range(num_nodes):
        replicas = np.ones(per_node, np.int64)
        share = np.empty(per_node, np.float32)
        for i in range(per_node):
            local[i] = i
            share[i] = weight[node_expert[node, i]]
        for slot in range(per_node, slots):
            hottest = 0
            for i in range(1, per_node):
                if share[i] > share[hottest]:
                    hottest = i
            local[slot] = hottest
            replicas[hottest] += 1
            share[hottest] = weight[node_expert[node, hottest]] / np.float32(replicas[hottest])
        for slot in range(slots):
            item_weight[slot] = share[local[slot]]
        _pack(item_weight, gpus, gpu_of, rank_of)
        for slot in range(slots):
            position = node * slots + gpu_of[slot] * slots_per_gpu + rank_of[slot]
            out[position] = node_expert[node, local[slot]]


@kernel
def _place(weight, num_slots, num_groups, num_nodes, num_gpus, out):  # type: ignore[no-untyped-def]
    for layer in range(weight.shape[0]):
        _place_layer(weight[layer], num_slots, num_groups, num_nodes, num_gpus, out[layer])


def eplb_placement(
    counts: np.ndarray, topology: Topology, num_slots: int, *, hierarchical: bool = False, num_groups: int | None = None
) -> ExpertMap:
    """EPLB's map for ``counts`` int64 [layers, experts].

    ``hierarchical`` packs groups of experts to nodes first (``num_groups`` of them, default one per node), then
    replicates and packs within each node; otherwise the GPUs form one pool ("global"). Raises InputError for sizes
    that do not divide.
    """
    layers, experts = counts.shape
    topology.slots_per_gpu(num_slots)
    if num_slots < experts:
        raise InputError(f"{num_slots} physical experts cannot hold {experts} logical experts; each needs a slot")
    nodes = topology.num_nodes if hierarchical else 1
    groups = (num_groups or nodes) if hierarchical else 1
    if experts % groups or groups % nodes:
        raise InputError(
            f"hierarchical packing: {experts} experts in {groups} groups over {nodes} nodes do not divide evenly"
        )
    out = np.empty((layers, num_slots), np.int32)
    _place(counts.astype(np.float32), num_slots, groups, nodes, topology.num_gpus, out)
    return ExpertMap(out, experts)
