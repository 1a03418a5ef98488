"""The rules of dispatch.py for one token as a kernel: what evaluate.py, the planner and the simulator count with."""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.dispatch.rules import RuleNumber
from sglang_eplb_affinity.domain.numba_kernel import kernel

_STATIC, _COVER = int(RuleNumber.STATIC), int(RuleNumber.COVER)


@kernel
def _visit(t, slot, slots_per_gpu, gpus_per_node, gpu_mark, node_mark):  # type: ignore[no-untyped-def]
    """Mark the GPU and node of a slot as visited by token t; returns how many of each were not yet, 0 or 1."""
    gpu = slot // slots_per_gpu
    node = gpu // gpus_per_node
    new_gpu = int(gpu_mark[gpu] != t)
    new_node = int(node_mark[node] != t)
    gpu_mark[gpu] = t
    node_mark[node] = t
    return new_gpu, new_node


@kernel
def static_slots(table, replicas, num_gpus, slots_per_gpu, gpus_per_node):  # type: ignore[no-untyped-def]
    """int32 [gpus, experts]: the slot that each GPU sends an expert's tokens to under ``static``.

    table int32 [experts, max_replicas]; replicas int32 [experts].
    """
    experts = table.shape[0]
    num_nodes = num_gpus // gpus_per_node
    out = np.empty((num_gpus, experts), np.int32)
    on_node = np.empty(num_nodes, np.int64)
    turn = np.empty(num_nodes + 1, np.int64)
    candidates = np.empty(table.shape[1], np.int64)
    for e in range(experts):
        on_node[:] = 0
        turn[:] = e
        for i in range(replicas[e]):
            on_node[table[e, i] // slots_per_gpu // gpus_per_node] += 1
        for rank in range(num_gpus):
            node = rank // gpus_per_node
            own = -1
            found = 0
            for i in range(replicas[e]):
                gpu = table[e, i] // slots_per_gpu
                if gpu == rank and own < 0:
                    own = table[e, i]
                if on_node[node] == 0 or gpu // gpus_per_node == node:
                    candidates[found] = table[e, i]
                    found += 1
            if own >= 0:
                out[rank, e] = own
                continue
            group = node if on_node[node] > 0 else num_nodes
            out[rank, e] = candidates[turn[group] % found]
            turn[group] += 1
    return out


@kernel
def choose_slots(  # type: ignore[no-untyped-def]
    t, row, home, table, replicas, static, slots_per_gpu, gpus_per_node, rule, gpu_mark, node_mark, candidates, out
):
    """Write the slot of each expert of one token into out int64 [k] (-1 for padding); returns its (GPU, node) fan-out.

    t: the token's row number, for the hash; row int16 [k]; home: its GPU, or -1 where it is not known; table int32
    [experts, max_replicas]; replicas int32 [experts]; static: :func:`static_slots` where that is the rule and homes are
    known, else not read; rule: a RuleNumber. gpu_mark int64 [gpus] and
    node_mark int64 [nodes] hold the last token that visited each (start with -1); candidates int64 [max_replicas] is
    scratch.
    """
    home_node = home // gpus_per_node if home >= 0 else -1
    fan = 0
    node_fan = 0
    for j in range(row.shape[0]):
        e = row[j]
        out[j] = -1
        if rule == _COVER and e >= 0 and replicas[e] == 1:
            out[j] = table[e, 0]
            new_gpu, new_node = _visit(t, out[j], slots_per_gpu, gpus_per_node, gpu_mark, node_mark)
            fan += new_gpu
            node_fan += new_node
    for j in range(row.shape[0]):
        e = row[j]
        if e < 0 or out[j] >= 0:
            continue
        n = int(replicas[e])
        slot = int(table[e, 0])
        if n > 1:
            h = (int(t) * 0x9E3779B1 + int(e) * 0x85EBCA77) & 0xFFFFFFFF
            h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
            h = h ^ (h >> 13)
            slot = int(table[e, h % n])
            if rule == _STATIC and home >= 0:
                slot = int(static[home, e])
            elif rule == _COVER:
                for step in range(4):
                    found = 0
                    for i in range(n):
                        gpu = int(table[e, i]) // slots_per_gpu
                        node = gpu // gpus_per_node
                        if (
                            (step == 0 and gpu_mark[gpu] == t)
                            or (step == 1 and node_mark[node] == t)
                            or (step == 2 and gpu == home)
                            or (step == 3 and node == home_node)
                        ):
                            candidates[found] = table[e, i]
                            found += 1
                    if found:
                        slot = candidates[h % found]
                        break
        out[j] = slot
        new_gpu, new_node = _visit(t, slot, slots_per_gpu, gpus_per_node, gpu_mark, node_mark)
        fan += new_gpu
        node_fan += new_node
    return fan, node_fan
