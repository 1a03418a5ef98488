"""What a map costs on recorded tokens: fan-outs, remote copies and GPU load under a dispatch rule.

Terms, all per token and layer: GPU (node) fan-out is the number of distinct GPUs (nodes) that a token's experts sit
on. Remote copies are the destinations other than the token's own: GPUs other than its source GPU, nodes other than
its source node. Load is the number of token-expert assignments of a GPU; max/mean over the GPUs of a layer.

Traces do not record where a token was. :func:`source_gpus` says what is assumed: with data-parallel attention a
sequence lives on one rank, so sequence s belongs to GPU s modulo GPUs; without sequences token t to GPU t modulo GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from sglang_eplb_affinity.dispatch.numba_rules import choose_slots, slots_of_sources, weights_of_passes
from sglang_eplb_affinity.dispatch.rule_tables import tables_of_rule
from sglang_eplb_affinity.dispatch.rules import DispatchRule, RuleNumber
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.domain.topology import Topology

PerLayer = TypeVar("PerLayer")

SOURCE_MODEL = "GPU of a token = its sequence modulo GPUs (as with data-parallel attention); without sequences its row"
DEFINITIONS = {
    "gpu_fanout": "distinct destination GPUs per token and layer: copies of DeepEP's normal mode and of DeepEP V2",
    "node_fanout": "distinct destination nodes per token and layer",
    "extra_nodes": "node_fanout - 1: copies to remote nodes if the source is one of the nodes visited anyway",
    "remote_gpu_copies": "destination GPUs other than the source GPU (source_model), per token and layer",
    "remote_node_copies": "destination nodes other than the source node (source_model), per token and layer",
    "expert_node_copies": "experts on nodes other than the source node: what low-latency dispatch sends, per token",
    "load_max_over_mean": "token-expert assignments of the most loaded GPU over the mean GPU, averaged over layers",
    "pass_load_max_over_mean": "the same in each pass; mean of the passes in which every source has all its tokens",
    "pass_active_slots": "slots that have tokens, of the GPU that has most of them; mean of the same passes",
}
METRICS = tuple(DEFINITIONS)
_BALANCED = int(RuleNumber.COVER_BALANCED)
NOT_KEPT = np.empty((0, 0), np.int16)
ONE_PASS = np.empty(0, np.int32)
NO_PASS_LOAD = np.empty((0, 0), np.int64)


@dataclass(frozen=True)
class Traffic:
    """One map on one trace under one rule; every array has one value per layer.

    ``gpu_fanout``, ``node_fanout``, ``extra_nodes``, ``remote_gpu_copies``, ``remote_node_copies`` and
    ``expert_node_copies`` (see DEFINITIONS) are float64 [layers] means per token; ``gpu_load`` is int64 [layers, gpus]
    and ``load_max_over_mean`` float64 [layers]. ``pass_load_max_over_mean`` and ``pass_active_slots`` float64
    [layers]: of the mean pass.
    """

    gpu_fanout: np.ndarray
    node_fanout: np.ndarray
    extra_nodes: np.ndarray
    remote_gpu_copies: np.ndarray
    remote_node_copies: np.ndarray
    expert_node_copies: np.ndarray
    gpu_load: np.ndarray
    load_max_over_mean: np.ndarray
    pass_load_max_over_mean: np.ndarray
    pass_active_slots: np.ndarray


@kernel
def measure_layer(  # type: ignore[no-untyped-def]
    tokens, source, table, replicas, slots_per_gpu, gpus_per_node, num_nodes, rule, sums, load, chosen,
    pass_of, pass_load,
):  # fmt: skip
    """One layer of :func:`measure`; the same rules as dispatch.py.

    tokens int16 [T, k]; source int32 [T] or empty; table int32 [experts, max_replicas]; replicas int32 [experts];
    rule: a RuleNumber. Adds to sums int64 [5] and load int64 [slots]; writes chosen int16 [T, k], the
    slot of each (token, expert), unless it is empty. pass_of int32 [T]: the pass of each token, empty if they are one;
    pass_load int64 [passes, slots] gets the load of each, unless it is empty.
    """
    count, k = tokens.shape
    gpu_mark = np.full(load.shape[0] // slots_per_gpu, -1, np.int64)
    node_mark = np.full(num_nodes, -1, np.int64)
    candidates = np.empty(table.shape[1], np.int64)
    slots = np.empty(k, np.int64)
    has_source = source.shape[0] > 0
    keep = chosen.shape[0] > 0
    gpus = load.shape[0] // slots_per_gpu
    static = slots_of_sources(table, replicas, gpus, slots_per_gpu, gpus_per_node, rule, has_source)
    no_ties = np.empty(0, np.int64)
    weights = np.empty((1, 0), np.int64)
    has_pass = pass_of.shape[0] > 0
    if rule == _BALANCED:
        passes = pass_of.max() + 1 if has_pass else 1
        weights = weights_of_passes(
            tokens, source, pass_of, passes, table, replicas, slots_per_gpu, gpus_per_node, gpus
        )
    for t in range(count):
        if tokens[t, 0] < 0:
            continue
        of = pass_of[t] if has_pass else 0
        home = np.int64(source[t]) if has_source else np.int64(-1)
        fan, node_fan = choose_slots(
            t, tokens[t], home, table, replicas, static, slots_per_gpu, gpus_per_node, rule, gpu_mark, node_mark,
            candidates, slots, no_ties,
            weights[(of * gpus + home if has_source else of) if rule == _BALANCED else 0],
        )  # fmt: skip
        home_node = home // gpus_per_node
        for j in range(k):
            slot = slots[j]
            if slot < 0:
                continue
            load[slot] += 1
            if pass_load.shape[0] > 0:
                pass_load[of, slot] += 1
            if keep:
                chosen[t, j] = slot
            if has_source and slot // slots_per_gpu // gpus_per_node != home_node:
                sums[4] += 1
        sums[0] += fan
        sums[1] += node_fan
        if has_source:
            sums[2] += fan - (1 if gpu_mark[home] == t else 0)
            sums[3] += node_fan - (1 if node_mark[home_node] == t else 0)


def source_gpus(trace: RoutingTrace, topology: Topology) -> np.ndarray:
    """int32 [tokens]: the GPU that each token is assumed to come from (see the module's text)."""
    key = np.arange(trace.num_tokens) if trace.sequence is None else trace.sequence
    return (key % topology.num_gpus).astype(np.int32)


def dealt_sources(num_tokens: int, topology: Topology) -> np.ndarray:
    """int32 [num_tokens]: GPUs in turn, for samples that do not say where a token was."""
    return (np.arange(num_tokens) % topology.num_gpus).astype(np.int32)


def passes_of(
    num_tokens: int, source: np.ndarray | None, topology: Topology, pass_tokens: int | None
) -> tuple[np.ndarray, int]:
    """(int32 [num_tokens]: the pass of each token, or empty where they are one; how many are complete, at least 1).

    Pass p has the p-th ``pass_tokens`` tokens of every source GPU that has any, and is complete if they all have so
    many; without sources it has the p-th ``pass_tokens * num_gpus`` tokens. Complete passes come first. Where there is
    none, all tokens are one pass.
    """
    if pass_tokens is None:
        return ONE_PASS, 1
    if source is None:
        per_pass = pass_tokens * topology.num_gpus
        complete = num_tokens // per_pass
        of = (np.arange(num_tokens) // per_pass).astype(np.int32)
    else:
        of = np.empty(num_tokens, np.int32)
        counts = np.bincount(source, minlength=topology.num_gpus)
        for gpu in range(topology.num_gpus):
            of[source == gpu] = np.arange(counts[gpu]) // pass_tokens
        complete = int(counts[counts > 0].min(initial=num_tokens)) // pass_tokens
    return (of, complete) if complete else (ONE_PASS, 1)


def check_fits(expert_map: ExpertMap, num_layers: int, num_experts: int, source: str, map_source: str = "map") -> None:
    """Raise InputError unless the map has the layers and experts of the routing."""
    if expert_map.num_layers != num_layers:
        raise InputError(f"{map_source}: has {expert_map.num_layers} layers, but {source} has {num_layers}")
    if expert_map.num_experts != num_experts:
        raise InputError(f"{map_source}: holds {expert_map.num_experts} experts, but {source} has {num_experts}")


def over_layers(one: Callable[[int], PerLayer], layers: int, threads: int) -> list[PerLayer]:
    """``one`` of each layer, on that many threads (kernels run without the GIL)."""
    if min(threads, layers) < 2:
        return [one(layer) for layer in range(layers)]
    with ThreadPoolExecutor(min(threads, layers), "eplb-affinity") as pool:
        return list(pool.map(one, range(layers)))


def measure(
    tokens: np.ndarray,
    expert_map: ExpertMap,
    topology: Topology,
    rule: DispatchRule,
    source: np.ndarray | None,
    threads: int = 1,
    pass_tokens: int | None = None,
    further_slots: int = 0,
) -> Traffic:
    """Traffic and load of ``tokens`` int16 [layers, T, k] (rows of -1 are skipped) under ``rule``.

    ``source`` int32 [T] is the GPU of each token, or None: then remote copies are 0 and source steps are skipped.
    ``threads`` share the layers. ``pass_tokens`` of each GPU make one pass; None: all tokens are one.
    ``further_slots``: of each GPU, under ``primary``.
    """
    layers = len(tokens)
    table, replicas, number = tables_of_rule(expert_map, topology, rule, further_slots)
    slots_per_gpu = topology.slots_per_gpu(expert_map.num_slots)
    sums = np.zeros((layers, 5), np.int64)
    slot_load = np.zeros((layers, expert_map.num_slots), np.int64)
    where = np.empty(0, np.int32) if source is None else source
    pass_of, complete = passes_of(tokens.shape[1], source, topology, pass_tokens)
    passes = int(pass_of.max()) + 1 if len(pass_of) else 1
    of_pass = np.zeros((layers, 2))

    def one(layer: int) -> None:
        pass_load = np.zeros((passes, expert_map.num_slots), np.int64)
        measure_layer(
            np.ascontiguousarray(tokens[layer], dtype=np.int16), where, table[layer], replicas[layer], slots_per_gpu,
            topology.gpus_per_node, topology.num_nodes, int(number), sums[layer],
            slot_load[layer],
            NOT_KEPT, pass_of, pass_load,
        )  # fmt: skip
        by_gpu = pass_load[:complete].reshape(complete, topology.num_gpus, -1)
        load = by_gpu.sum(2)
        of_pass[layer, 0] = (load.max(1) / np.maximum(load.mean(1), 1e-12)).mean()
        of_pass[layer, 1] = (by_gpu > 0).sum(2).max(1).mean()

    over_layers(one, layers, threads)
    used = np.maximum((tokens >= 0).any(2).sum(1), 1)
    means = sums / used[:, None]
    load = slot_load.reshape(layers, topology.num_gpus, -1).sum(2)
    mean_load = np.maximum(load.mean(1), 1e-12)
    gpu, node, remote_gpu, remote_node, expert_node = means.T.copy()
    return Traffic(
        gpu, node, node - 1, remote_gpu, remote_node, expert_node, load, load.max(1) / mean_load,
        of_pass[:, 0], of_pass[:, 1],
    )  # fmt: skip


def measure_trace(
    trace: RoutingTrace, expert_map: ExpertMap, topology: Topology, rule: DispatchRule, map_source: str = "map",
    pass_tokens: int | None = None, further_slots: int = 0,
) -> Traffic:  # fmt: skip
    """:func:`measure` for a whole trace with the assumed source GPUs."""
    check_fits(expert_map, trace.num_layers, trace.num_experts, trace.source, map_source)
    tokens = np.ascontiguousarray(trace.topk_ids.transpose(1, 0, 2), dtype=np.int16)
    return measure(
        tokens, expert_map, topology, rule, source_gpus(trace, topology), pass_tokens=pass_tokens,
        further_slots=further_slots,
    )  # fmt: skip


def moved_experts(old: ExpertMap, new: ExpertMap, topology: Topology) -> np.ndarray:
    """int64 [layers]: slots of ``new`` whose expert is not on that GPU in ``old`` (weights that must travel)."""
    gpus = topology.num_gpus
    moved = np.zeros(new.num_layers, np.int64)
    for layer in range(new.num_layers):
        before = old.physical_to_logical[layer].reshape(gpus, -1)
        after = new.physical_to_logical[layer].reshape(gpus, -1)
        moved[layer] = sum(len(set(after[g].tolist()) - set(before[g].tolist())) for g in range(gpus))
    return moved


def even_load(counts: np.ndarray, expert_map: ExpertMap, topology: Topology) -> np.ndarray:
    """float64 [layers, gpus]: load of ``counts`` int64 [layers, experts], each expert's shared evenly by its replicas.

    What EPLB assumes, and all that counts without token sets can say.
    """
    share = counts / np.maximum(expert_map.replica_counts(), 1)
    of_slot = np.take_along_axis(share, expert_map.physical_to_logical.astype(np.int64), axis=1)
    per_gpu = topology.slots_per_gpu(expert_map.num_slots)
    return np.asarray(of_slot.reshape(len(counts), topology.num_gpus, per_gpu).sum(2))
