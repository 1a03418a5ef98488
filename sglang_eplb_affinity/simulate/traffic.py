"""What one batch puts on every link and GPU: token copies of DeepEP's normal and low-latency modes, and expert load.

Normal mode (DeepEP README, "asymmetric-domain bandwidth forwarding"): a token goes once over RDMA to each other node
that it needs, to the GPU with its source's index there, and from that GPU (at home: from the source itself) once over
NVLink to each GPU. Low-latency mode: one copy for each (token, expert), over NVLink within a node, else over RDMA.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.dispatch.numba_rules import choose_slots, slots_of_sources, weights_of_passes
from sglang_eplb_affinity.dispatch.rule_tables import tables_of_rule
from sglang_eplb_affinity.dispatch.rules import DispatchRule, RuleNumber
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.domain.topology import Topology

# Rows of the per-GPU counters.
NORMAL_RECEIVED, NORMAL_LOCAL, NORMAL_NVLINK_OUT, NORMAL_RDMA_OUT, NORMAL_RDMA_IN = range(5)
LATENCY_NVLINK_OUT, LATENCY_NVLINK_IN, LATENCY_RDMA_OUT, LATENCY_RDMA_IN = range(5, 9)
OWN_NODE_TOKENS, NORMAL_FORWARDED, LATENCY_LOCAL = 9, 10, 11
NUM_COUNTERS = 12

_BALANCED = int(RuleNumber.COVER_BALANCED)
_ONE_PASS = np.empty(0, np.int32)


@dataclass(frozen=True)
class BatchTraffic:
    """One layer and batch. ``counters`` int64 [NUM_COUNTERS, gpus] in token copies; ``slot_load`` int64 [slots].

    ``NORMAL_RECEIVED`` counts every copy that arrives at a GPU, its own tokens (``NORMAL_LOCAL``) included;
    ``LATENCY_NVLINK_*`` count copies within a node, those of a GPU to itself included; ``OWN_NODE_TOKENS`` the tokens
    that need at least one GPU of their own node; ``NORMAL_FORWARDED`` the copies that a GPU hands out in its node
    (of its own tokens and of those that came over RDMA), to itself too; ``LATENCY_LOCAL`` a GPU's copies to itself.
    ``most_rows``: the most experts that one token has on one GPU, rows that its one copy stands for there.
    """

    counters: np.ndarray
    slot_load: np.ndarray
    num_tokens: int
    most_rows: int = 0

    @property
    def gpu_load(self) -> np.ndarray:
        return self.slot_load.reshape(self.counters.shape[1], -1).sum(1)

    @property
    def gpu_fanout(self) -> float:
        return float(self.counters[NORMAL_RECEIVED].sum() / self.num_tokens)

    @property
    def remote_node_copies(self) -> float:
        return float(self.counters[NORMAL_RDMA_OUT].sum() / self.num_tokens)

    @property
    def node_fanout(self) -> float:
        return self.remote_node_copies + float(self.counters[OWN_NODE_TOKENS].sum() / self.num_tokens)

    @property
    def load_max_over_mean(self) -> float:
        load = self.gpu_load
        return float(load.max() / max(load.mean(), 1e-12))


@kernel
def _count(tokens, source, table, replicas, slots_per_gpu, gpus_per_node, num_nodes, rule, counters, slot_load):  # type: ignore[no-untyped-def]
    """Add all tokens int16 [T, k] from source int32 [T] to counters and slot_load; the most rows of a copy."""
    num_gpus = counters.shape[1]
    k = tokens.shape[1]
    gpu_mark = np.full(num_gpus, -1, np.int64)
    node_mark = np.full(num_nodes, -1, np.int64)
    seen_gpu = np.full(num_gpus, -1, np.int64)
    seen_node = np.full(num_nodes, -1, np.int64)
    rows, most_rows = np.zeros(num_gpus, np.int64), 0
    free = np.empty(table.shape[1], np.int64)
    slots = np.empty(k, np.int64)
    static = slots_of_sources(table, replicas, num_gpus, slots_per_gpu, gpus_per_node, rule, True)
    no_ties = np.empty(0, np.int64)
    weights = np.empty((num_gpus, 0), np.int64)
    if rule == _BALANCED:
        weights = weights_of_passes(
            tokens, source, _ONE_PASS, 1, table, replicas, slots_per_gpu, gpus_per_node, num_gpus
        )
    for t in range(tokens.shape[0]):
        home = np.int64(source[t])
        home_node = home // gpus_per_node
        index = home % gpus_per_node
        choose_slots(
            t, tokens[t], home, table, replicas, static, slots_per_gpu, gpus_per_node, rule, gpu_mark, node_mark, free,
            slots, no_ties, weights[home],
        )  # fmt: skip
        for j in range(k):
            slot = slots[j]
            gpu = slot // slots_per_gpu
            node = gpu // gpus_per_node
            slot_load[slot] += 1
            if node == home_node:
                counters[LATENCY_NVLINK_OUT, home] += 1
                counters[LATENCY_NVLINK_IN, gpu] += 1
                if gpu == home:
                    counters[LATENCY_LOCAL, gpu] += 1
            else:
                counters[LATENCY_RDMA_OUT, home] += 1
                counters[LATENCY_RDMA_IN, gpu] += 1
            if seen_node[node] != t:
                seen_node[node] = t
                if node == home_node:
                    counters[OWN_NODE_TOKENS, home] += 1
                else:
                    counters[NORMAL_RDMA_OUT, home] += 1
                    counters[NORMAL_RDMA_IN, node * gpus_per_node + index] += 1
            if seen_gpu[gpu] != t:
                seen_gpu[gpu], rows[gpu] = t, 0
                counters[NORMAL_RECEIVED, gpu] += 1
                forwarder = node * gpus_per_node + index
                counters[NORMAL_FORWARDED, forwarder] += 1
                if gpu == home:
                    counters[NORMAL_LOCAL, gpu] += 1
                elif forwarder != gpu:
                    counters[NORMAL_NVLINK_OUT, forwarder] += 1
            rows[gpu] += 1
            most_rows = max(most_rows, rows[gpu])
    return most_rows


def batch_traffic(
    tokens: np.ndarray, source: np.ndarray, expert_map: ExpertMap, layer: int, topology: Topology, rule: DispatchRule,
    further_slots: int = 0,
) -> BatchTraffic:  # fmt: skip
    """Traffic of one layer: ``tokens`` int16 [T, k] logical ids, ``source`` int32 [T] the GPU of each token."""
    counters = np.zeros((NUM_COUNTERS, topology.num_gpus), np.int64)
    slot_load = np.zeros(expert_map.num_slots, np.int64)
    one = ExpertMap(expert_map.physical_to_logical[layer : layer + 1], expert_map.num_experts)
    table, replicas, number = tables_of_rule(one, topology, rule, further_slots)
    most_rows = _count(
        np.ascontiguousarray(tokens, dtype=np.int16),
        np.ascontiguousarray(source, dtype=np.int32),
        table[0],
        replicas[0],
        topology.slots_per_gpu(expert_map.num_slots),
        topology.gpus_per_node,
        topology.num_nodes,
        int(number),
        counters,
        slot_load,
    )
    return BatchTraffic(counters, slot_load, len(tokens), int(most_rows))
