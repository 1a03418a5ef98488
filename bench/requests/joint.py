"""Placement for the requests that each rank serves: the same search with and without knowing where tokens are.

Annealing over the slots of a layer: two slots swap experts, or a slot takes over a replica of another's expert. A token
costs what its dispatch sends off its GPU and off its node, counted exactly by the dispatch rule; assignments beyond a
cap on a GPU's load are charged. Sequential, and for studies: the planner proper is sglang_eplb_affinity.planner.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from bench.requests.labels import CopyCost
from sglang_eplb_affinity.dispatch.numba_rules import choose_slots, static_slots
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.simulate.system import DeepEPMode

OVERLOAD = 2.0  # cost of an assignment beyond the cap, in copies over the slowest link


@dataclass(frozen=True)
class Search:
    """``tokens`` sampled for each layer, ``proposals``, the ``cap`` on load max/mean, and the first temperature."""

    tokens: int = 1024
    proposals: int = 5000
    cap: float = 1.03
    temperature: float = 4.0
    seed: int = 0
    threads: int = 2


@kernel
def _place(row, slots, table, replicas):  # type: ignore[no-untyped-def]
    """Write the slots of expert ``row`` of ``slots`` into its table row."""
    found = 0
    for slot in range(slots.shape[0]):
        if slots[slot] == row:
            table[row, found] = slot
            found += 1
    replicas[row] = found
    for i in range(found, table.shape[1]):
        table[row, i] = -1


@kernel
def _anneal(  # type: ignore[no-untyped-def]
    slots,
    tokens,
    source,
    first,
    holders,
    num_gpus,
    gpus_per_node,
    latency,
    gpu_cost,
    node_cost,
    cap,
    proposals,
    temperature,
    seed,
):
    """Improve slots int32 [slots] in place; returns the cost per token of the best map, which slots then hold.

    tokens int16 [T, k]; source int64 [T]; first int64 [experts + 1] and holders int64 [T * k]: rows of ``tokens`` with
    each expert; ``latency``: one copy for each (token, expert) by ``static``, else one for each GPU by ``cover``.
    """
    np.random.seed(seed)
    count, k = tokens.shape
    experts = first.shape[0] - 1
    size = slots.shape[0] // num_gpus
    rule = 1 if latency else 0
    table = np.full((experts, num_gpus + 1), -1, np.int32)
    replicas = np.zeros(experts, np.int32)
    for e in range(experts):
        _place(e, slots, table, replicas)
    held = np.zeros((experts, num_gpus), np.int64)
    for s in range(slots.shape[0]):
        held[slots[s], s // size] += 1
    static = static_slots(table, replicas, num_gpus, size, gpus_per_node)
    gpu_mark = np.full(num_gpus, -1, np.int64)
    node_mark = np.full(num_gpus // gpus_per_node, -1, np.int64)
    scratch = np.empty(table.shape[1], np.int64)
    nothing = np.zeros(0, np.int64)  # `cover_balanced` alone counts ties and weighs
    out = np.empty(k, np.int64)
    cost = np.zeros(count)
    new_cost = np.zeros(count)
    on_gpu = np.zeros((count, k), np.int16)
    new_gpu = np.zeros((count, k), np.int16)
    load = np.zeros(num_gpus)
    new_load = np.zeros(num_gpus)
    rows = np.arange(count)
    mark = np.full(count, -1, np.int64)
    limit = cap * count * k / num_gpus
    best = slots.copy()
    best_cost = np.inf
    current = 0.0
    over = 0.0
    for step in range(-1, proposals):
        touched = count
        a = 0
        b = -1
        ea = slots[0]
        eb = slots[0]
        if step >= 0:
            a = np.random.randint(slots.shape[0])
            b = np.random.randint(slots.shape[0])
            ea = slots[a]
            eb = slots[b]
            if a // size == b // size or ea == eb or held[eb, a // size] > 0:
                continue
            if replicas[ea] > 1 and np.random.random() < 0.4:
                b = -1
            elif held[ea, b // size] > 0:
                continue
            slots[a] = eb
            if b >= 0:
                slots[b] = ea
            _place(ea, slots, table, replicas)
            _place(eb, slots, table, replicas)
            if latency:
                static = static_slots(table, replicas, num_gpus, size, gpus_per_node)
            touched = 0
            for i in range(first[ea], first[ea + 1]):
                mark[holders[i]] = step
                rows[touched] = holders[i]
                touched += 1
            for i in range(first[eb], first[eb + 1]):
                if mark[holders[i]] != step:
                    rows[touched] = holders[i]
                    touched += 1
        new_load[:] = load
        change = 0.0
        for i in range(touched):
            t = rows[i]
            gpu_mark[:] = -1
            node_mark[:] = -1
            home = source[t]
            home_node = home // gpus_per_node
            fan, node_fan = choose_slots(
                t, tokens[t], home, table, replicas, static, size, gpus_per_node, rule, gpu_mark, node_mark, scratch,
                out, nothing, nothing,
            )  # fmt: skip
            if latency:
                value = 0.0
                for j in range(k):
                    value += gpu_cost * (out[j] // size != home)
                    value += node_cost * (out[j] // size // gpus_per_node != home_node)
            else:
                value = gpu_cost * (fan - (gpu_mark[home] == t)) + node_cost * (node_fan - (node_mark[home_node] == t))
            new_cost[i] = value
            change += value - cost[t]
            for j in range(k):
                new_gpu[i, j] = out[j] // size
                new_load[new_gpu[i, j]] += 1
                if step >= 0:
                    new_load[on_gpu[t, j]] -= 1
        new_over = 0.0
        for g in range(num_gpus):
            new_over += max(0.0, new_load[g] - limit)
        rise = change + OVERLOAD * (new_over - over)
        heat = temperature * (1 - step / proposals) + 1e-9
        if step < 0 or rise <= 0 or np.random.random() < np.exp(-rise / heat):
            for i in range(touched):
                cost[rows[i]] = new_cost[i]
                on_gpu[rows[i]] = new_gpu[i]
            load[:] = new_load
            over = new_over
            current += change
            if step >= 0:
                held[ea, a // size] -= 1
                held[eb, a // size] += 1
                if b >= 0:
                    held[ea, b // size] += 1
                    held[eb, b // size] -= 1
            if current + OVERLOAD * over < best_cost:
                best_cost = current + OVERLOAD * over
                best[:] = slots
        else:
            slots[a] = ea
            if b >= 0:
                slots[b] = eb
            _place(ea, slots, table, replicas)
            _place(eb, slots, table, replicas)
            if latency:
                static = static_slots(table, replicas, num_gpus, size, gpus_per_node)
    slots[:] = best
    return best_cost / count


def anneal(
    start: ExpertMap, trace: RoutingTrace, source: np.ndarray, topology: Topology, mode: DeepEPMode, cost: CopyCost,
    search: Search = Search(),
) -> ExpertMap:  # fmt: skip
    """A map searched from ``start`` for tokens of ``trace`` that come from ``source`` int [tokens].

    ``cover`` decides in normal mode, ``static`` in low latency. No GPU of ``start`` may hold an expert twice.
    """
    rng = np.random.default_rng(search.seed)
    rows = rng.choice(trace.num_tokens, min(search.tokens, trace.num_tokens), replace=False)
    where = np.ascontiguousarray(source[rows], dtype=np.int64)

    def one(layer: int) -> np.ndarray:
        tokens = np.ascontiguousarray(trace.topk_ids[rows, layer], dtype=np.int16)
        order = np.argsort(tokens.ravel(), kind="stable")
        first = np.searchsorted(tokens.ravel()[order], np.arange(trace.num_experts + 1)).astype(np.int64)
        slots = start.physical_to_logical[layer].copy()
        _anneal(
            slots, tokens, where, first, (order // tokens.shape[1]).astype(np.int64), topology.num_gpus,
            topology.gpus_per_node, mode == "low_latency", cost.gpu, cost.node, search.cap, search.proposals,
            search.temperature, search.seed,
        )  # fmt: skip
        return slots

    with ThreadPoolExecutor(search.threads) as pool:
        return ExpertMap(np.stack(list(pool.map(one, range(trace.num_layers)))), trace.num_experts)


def spread_map(counts: np.ndarray, topology: Topology, num_slots: int) -> ExpertMap:
    """A start without two replicas on one GPU: the hottest experts get most, each goes to the GPU with most room.

    ``counts`` int64 [layers, experts].
    """
    size = topology.slots_per_gpu(num_slots)
    rows = []
    for of_layer in counts:
        replicas = np.ones(len(of_layer), np.int64)
        for _ in range(num_slots - len(of_layer)):
            replicas[np.where(replicas < topology.num_gpus, (of_layer + 1) / replicas, -1).argmax()] += 1
        load, used = np.zeros(topology.num_gpus), np.zeros(topology.num_gpus, np.int64)
        on: list[list[int]] = [[] for _ in range(topology.num_gpus)]
        # Experts with most replicas first, each on the GPUs with fewest experts: then the last always finds enough.
        for expert in np.lexsort((-of_layer / replicas, -replicas)):
            gpus = np.lexsort((load, used))[: replicas[expert]]
            for gpu in gpus:
                on[gpu].append(int(expert))
            used[gpus] += 1
            load[gpus] += of_layer[expert] / replicas[expert]
        rows.append([expert for experts in on for expert in experts])
        assert used.max() == size
    return ExpertMap(np.array(rows, np.int32), counts.shape[1])
