"""The kernel against the reference dispatch rules and a plain count."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, dispatch_trace
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.simulate import traffic as t


def plain_count(physical: np.ndarray, source: np.ndarray, topology: Topology, slots: int):
    """Counters of one layer from physical ids, token by token."""
    counters = np.zeros((t.NUM_COUNTERS, topology.num_gpus), np.int64)
    per_gpu, per_node = slots // topology.num_gpus, topology.gpus_per_node
    for row, home in zip(physical.tolist(), source.tolist(), strict=True):
        gpus = [slot // per_gpu for slot in row]
        for gpu in gpus:
            near = gpu // per_node == home // per_node
            counters[t.LATENCY_NVLINK_OUT if near else t.LATENCY_RDMA_OUT, home] += 1
            counters[t.LATENCY_NVLINK_IN if near else t.LATENCY_RDMA_IN, gpu] += 1
            counters[t.LATENCY_LOCAL, gpu] += gpu == home
        for node in {gpu // per_node for gpu in gpus}:
            if node == home // per_node:
                counters[t.OWN_NODE_TOKENS, home] += 1
            else:
                counters[t.NORMAL_RDMA_OUT, home] += 1
                counters[t.NORMAL_RDMA_IN, node * per_node + home % per_node] += 1
        for gpu in set(gpus):
            counters[t.NORMAL_RECEIVED, gpu] += 1
            forwarder = gpu // per_node * per_node + home % per_node
            counters[t.NORMAL_FORWARDED, forwarder] += 1
            if gpu == home:
                counters[t.NORMAL_LOCAL, gpu] += 1
            elif forwarder != gpu:
                counters[t.NORMAL_NVLINK_OUT, forwarder] += 1
    return counters


@pytest.mark.parametrize("rule", DISPATCH_RULES)
@pytest.mark.parametrize(("gpus", "nodes", "slots"), [(4, 1, 16), (8, 2, 24), (8, 4, 32)])
def test_kernel_equals_reference(trace, rule, gpus, nodes, slots):
    topology = Topology(gpus, nodes)
    rng = np.random.default_rng(1)
    row = np.concatenate([np.arange(16), rng.integers(0, 16, slots - 16)])
    expert_map = ExpertMap(rng.permutation(row)[None].astype(np.int32), 16)
    ids = trace.topk_ids[:400, :1]
    source = rng.integers(0, gpus, 400).astype(np.int32)
    physical = dispatch_trace(ids, expert_map, topology, rule, source)[:, 0]
    found = t.batch_traffic(ids[:, 0], source, expert_map, 0, topology, rule)
    np.testing.assert_array_equal(found.counters, plain_count(physical, source, topology, slots))
    np.testing.assert_array_equal(found.slot_load, np.bincount(physical.ravel(), minlength=slots))
    of_gpu = physical // (slots // gpus)
    assert found.most_rows == max(np.bincount(row).max() for row in of_gpu)


def test_totals_are_consistent(trace):
    topology = Topology(8, 2)
    source = (np.arange(trace.num_tokens) % 8).astype(np.int32)
    found = t.batch_traffic(trace.topk_ids[:, 0], source, ExpertMap.contiguous(1, 16, 16), 0, topology, "static")
    assert found.slot_load.sum() == trace.num_tokens * trace.top_k
    assert found.counters[t.NORMAL_RDMA_OUT].sum() == found.counters[t.NORMAL_RDMA_IN].sum()
    assert found.counters[t.LATENCY_RDMA_OUT].sum() == found.counters[t.LATENCY_RDMA_IN].sum()
    assert 1 <= found.node_fanout <= 2 and found.node_fanout <= found.gpu_fanout <= trace.top_k
