"""The rules of dispatch.py for one token as a kernel: what evaluate.py, the planner and the simulator count with."""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.dispatch.rules import EVEN_WEIGHT, MOST_WEIGHT, RuleNumber
from sglang_eplb_affinity.domain.numba_kernel import kernel

_STATIC, _COVER, _BALANCED = int(RuleNumber.STATIC), int(RuleNumber.COVER), int(RuleNumber.COVER_BALANCED)


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
def deal_expert(e, slots, count, num_gpus, slots_per_gpu, gpus_per_node, out):  # type: ignore[no-untyped-def]
    """Write into out int32 [gpus] the slot that each GPU sends expert e's tokens to under ``static``; slots int32, the
    first ``count`` of them e's in rising order."""
    on_node = np.zeros(num_gpus // gpus_per_node, np.int64)
    turn = np.full(num_gpus // gpus_per_node + 1, e, np.int64)
    candidates = np.empty(count, np.int64)
    for i in range(count):
        on_node[slots[i] // slots_per_gpu // gpus_per_node] += 1
    for rank in range(num_gpus):
        node = rank // gpus_per_node
        own = -1
        found = 0
        for i in range(count):
            gpu = slots[i] // slots_per_gpu
            if gpu == rank and own < 0:
                own = slots[i]
            if on_node[node] == 0 or gpu // gpus_per_node == node:
                candidates[found] = slots[i]
                found += 1
        if own >= 0:
            out[rank] = own
            continue
        group = node if on_node[node] > 0 else num_gpus // gpus_per_node
        out[rank] = candidates[turn[group] % found]
        turn[group] += 1


@kernel
def static_slots(table, replicas, num_gpus, slots_per_gpu, gpus_per_node):  # type: ignore[no-untyped-def]
    """int32 [gpus, experts]: the slot that each GPU sends an expert's tokens to under ``static``.

    table int32 [experts, max_replicas]; replicas int32 [experts].
    """
    out = np.empty((table.shape[0], num_gpus), np.int32)
    for e in range(table.shape[0]):
        deal_expert(e, table[e], replicas[e], num_gpus, slots_per_gpu, gpus_per_node, out[e])
    return np.ascontiguousarray(out.T)


@kernel
def slots_of_sources(table, replicas, num_gpus, slots_per_gpu, gpus_per_node, rule, has_source):  # type: ignore[no-untyped-def]
    """:func:`static_slots` where the rule needs them, for :func:`choose_slots`; [0, 0] for other rules."""
    if rule == _STATIC and has_source:
        return static_slots(table, replicas, num_gpus, slots_per_gpu, gpus_per_node)
    return np.empty((0, 0), np.int32)


@kernel
def _drawn(candidates, count, h, weights, slots_per_gpu):  # type: ignore[no-untyped-def]
    """The candidate slot that the hash falls on if each has a share as large as its GPU's weight."""
    total = np.int64(0)
    for i in range(count):
        total += weights[candidates[i] // slots_per_gpu]
    drawn = (int(h) * total) >> 32
    for i in range(count):
        drawn -= weights[candidates[i] // slots_per_gpu]
        if drawn < 0:
            return candidates[i]
    return candidates[count - 1]


@kernel
def choose_slots(  # type: ignore[no-untyped-def]
    t, row, home, table, replicas, static, slots_per_gpu, gpus_per_node, rule, gpu_mark, node_mark, candidates, out,
    ties, weights,
):  # fmt: skip
    """Write the slot of each expert of one token into out int64 [k] (-1 for padding); returns its (GPU, node) fan-out.

    t: the token's row number, for the hash; row int16 [k]; home: its GPU, or -1 where it is not known; table int32
    [experts, max_replicas]; replicas int32 [experts]; static: :func:`slots_of_sources`; rule: a RuleNumber other than
    ``primary``, which is ``static`` among other replicas (rule_tables.tables_of_rule). gpu_mark int64 [gpus] and
    node_mark int64 [nodes] hold the last token that visited each (start with -1); candidates int64 [max_replicas] is
    scratch. For ``cover_balanced``: ties int64 [gpus] counts the choices that had other candidates, unless it is empty;
    weights int64 [gpus] of the candidates, empty for the first choice.
    """
    home_node = home // gpus_per_node if home >= 0 else -1
    fan = 0
    node_fan = 0
    covers = rule in (_COVER, _BALANCED)
    for j in range(row.shape[0]):
        e = row[j]
        out[j] = -1
        if covers and e >= 0 and replicas[e] == 1:
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
            h = (int(t) * 0x9E3779B1 + int(e) * 0x85EBCA77 + (int(home) + 1) * 0xC2B2AE3D) & 0xFFFFFFFF
            h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
            h = h ^ (h >> 13)
            slot = int(table[e, h % n])
            if rule == _STATIC and home >= 0:
                slot = int(static[home, e])
            elif covers:
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
                        break
                if not found:
                    for i in range(n):
                        candidates[i] = table[e, i]
                    found = n
                slot = candidates[h % found]
                if weights.shape[0] > 0:
                    slot = _drawn(candidates, found, h, weights, slots_per_gpu)
                if ties.shape[0] > 0 and found > 1:
                    ties[slot // slots_per_gpu] += 1
        out[j] = slot
        new_gpu, new_node = _visit(t, slot, slots_per_gpu, gpus_per_node, gpu_mark, node_mark)
        fan += new_gpu
        node_fan += new_node
    return fan, node_fan


@kernel
def weights_of_passes(  # type: ignore[no-untyped-def]
    tokens, source, pass_of, num_passes, table, replicas, slots_per_gpu, gpus_per_node, num_gpus
):
    """int64 [passes * sources, gpus]: the weights of ``cover_balanced`` for the tokens of each pass and source.

    tokens int16 [T, k], rows of -1 are skipped; source and pass_of int32 [T], empty where there is one.
    Row ``pass * sources + source`` of the result is theirs; see rules.tie_weights.
    """
    has_source = source.shape[0] > 0
    sources = num_gpus if has_source else 1
    load = np.zeros((num_passes * sources, num_gpus), np.int64)
    ties = np.zeros((num_passes * sources, num_gpus), np.int64)
    gpu_mark = np.full(num_gpus, -1, np.int64)
    node_mark = np.full(num_gpus // gpus_per_node, -1, np.int64)
    candidates = np.empty(table.shape[1], np.int64)
    slots = np.empty(tokens.shape[1], np.int64)
    static = np.empty((0, 0), np.int32)
    no_weights = np.empty(0, np.int64)
    for t in range(tokens.shape[0]):
        home = np.int64(source[t]) if has_source else np.int64(-1)
        of = max(home, 0) + (pass_of[t] * sources if pass_of.shape[0] > 0 else 0)
        choose_slots(
            t, tokens[t], home, table, replicas, static, slots_per_gpu, gpus_per_node, _BALANCED, gpu_mark, node_mark,
            candidates, slots, ties[of], no_weights,
        )  # fmt: skip
        for j in range(tokens.shape[1]):
            if slots[j] >= 0:
                load[of, slots[j] // slots_per_gpu] += 1
    for of in range(load.shape[0]):
        mean = (load[of].sum() + num_gpus - 1) // num_gpus
        for gpu in range(num_gpus):
            wanted = max(ties[of, gpu] + mean - load[of, gpu], 0)
            weight = EVEN_WEIGHT * wanted // max(ties[of, gpu], 1)
            ties[of, gpu] = min(max(weight, 1), MOST_WEIGHT)
    return ties
