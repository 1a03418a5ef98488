"""How near each rank is to a request's experts, and GPU labels aligned over layers so that one rank is near in all.

Which GPU of a layer's map is called rank r changes neither fan-out nor load of that layer, so labels are free to be
chosen: nodes may be permuted, and GPUs within a node (what shares a node stays together).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology

ROUNDS = 12


@dataclass(frozen=True)
class CopyCost:
    """Cost of a token copy that leaves its GPU, and of one that leaves its node (0 on one node)."""

    gpu: float
    node: float

    @staticmethod
    def of(topology: Topology, nvlink_gb_per_s: float, rdma_gb_per_s: float) -> CopyCost:
        """Times on the links, that of the slowest link used being 1."""
        return CopyCost(1.0, 0.0) if topology.num_nodes == 1 else CopyCost(rdma_gb_per_s / nvlink_gb_per_s, 1.0)


def held_by_gpu(expert_map: ExpertMap, topology: Topology) -> np.ndarray:
    """float32 [layers, experts, gpus]: 1 where the GPU holds a replica."""
    held = np.zeros((expert_map.num_layers, expert_map.num_experts, topology.num_gpus), np.float32)
    gpu = topology.gpu_of_slot(expert_map.num_slots)
    for layer, experts in enumerate(expert_map.physical_to_logical):
        held[layer, experts, gpu] = 1
    return held


def nearness(signatures: np.ndarray, expert_map: ExpertMap, topology: Topology, cost: CopyCost) -> np.ndarray:
    """float32 [requests, gpus]: cost per token, over all layers, that a request saves on a rank.

    ``signatures`` float32 [requests, layers, experts]. An expert on the rank saves a copy to a GPU and one to a node,
    an expert on its node the latter.
    """
    held = held_by_gpu(expert_map, topology)
    saved = cost.gpu * held
    if topology.num_nodes > 1:
        by_node = held.reshape(*held.shape[:2], topology.num_nodes, -1).max(3)
        saved += cost.node * by_node.repeat(topology.gpus_per_node, axis=2)
    return np.tensordot(signatures, saved, axes=([1, 2], [0, 1]))


def dealt_evenly(score: np.ndarray) -> np.ndarray:
    """int64 [requests]: the rank of each request that makes the sum of ``score`` [requests, ranks] greatest.

    No rank gets more than its share, rounded up.
    """
    share = -(-len(score) // score.shape[1])
    ranks = np.repeat(np.arange(score.shape[1]), share)
    return ranks[linear_sum_assignment(score[:, ranks], maximize=True)[1]]


def align_labels(
    expert_map: ExpertMap, topology: Topology, signatures: np.ndarray, cost: CopyCost, seed: int = 0, restarts: int = 3
) -> tuple[ExpertMap, np.ndarray]:
    """The map with labels aligned for requests like those of ``signatures``, and int64 [requests], their ranks.

    By turns: requests are dealt evenly to the ranks nearest to them, then each layer's labels are assigned to the ranks
    whose requests they serve best, until neither changes anything; the best of some random starts.
    """
    gpus, size = topology.num_gpus, topology.gpus_per_node
    rng = np.random.default_rng(seed)
    best: tuple[float, ExpertMap, np.ndarray] | None = None
    for start in range(restarts):
        current = expert_map
        if start:
            rows = [_relabelled(row, _random_labels(topology, rng)) for row in expert_map.physical_to_logical]
            current = ExpertMap(np.stack(rows), expert_map.num_experts)
        reached = -np.inf
        for _ in range(ROUNDS):
            score = nearness(signatures, current, topology, cost)
            ranks = dealt_evenly(score)
            total = float(score[np.arange(len(ranks)), ranks].sum())
            if best is None or total > best[0]:
                best = (total, current, ranks)
            if total <= reached * (1 + 1e-6):
                break
            reached = total
            by_rank = np.zeros((gpus, *signatures.shape[1:]), np.float32)
            np.add.at(by_rank, ranks, signatures)
            held = held_by_gpu(current, topology)
            rows = []
            for layer, row in enumerate(current.physical_to_logical):
                labels = _best_labels(held[layer], by_rank[:, layer], size, cost)
                rows.append(_relabelled(row, labels))
            current = ExpertMap(np.stack(rows), expert_map.num_experts)
    assert best is not None
    return best[1], best[2]


def _best_labels(held: np.ndarray, wanted: np.ndarray, size: int, cost: CopyCost) -> np.ndarray:
    """int64 [gpus]: the label of each GPU of a layer; ``held`` [experts, gpus], ``wanted`` [ranks, experts]."""
    gpus = held.shape[1]
    nodes = gpus // size
    on_gpu = cost.gpu * (wanted @ held).T  # [GPU, rank]
    on_node = held.reshape(len(held), nodes, size).max(2)
    of_nodes = cost.node * (wanted.reshape(nodes, size, -1).sum(1) @ on_node).T  # [node, node of ranks]
    inner = np.empty((nodes, nodes, size), np.int64)
    for old in range(nodes):
        for new in range(nodes):
            block = on_gpu[old * size : (old + 1) * size, new * size : (new + 1) * size]
            rows, columns = linear_sum_assignment(block, maximize=True)
            of_nodes[old, new] += block[rows, columns].sum()
            inner[old, new] = columns
    target = linear_sum_assignment(of_nodes, maximize=True)[1]
    return np.concatenate([new * size + inner[old, new] for old, new in enumerate(target)])


def _relabelled(slots: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """int32 [slots] with the experts of GPU g on GPU ``labels[g]``."""
    by_gpu = slots.reshape(len(labels), -1)
    out = np.empty_like(by_gpu)
    out[labels] = by_gpu
    return out.ravel()


def _random_labels(topology: Topology, rng: np.random.Generator) -> np.ndarray:
    size = topology.gpus_per_node
    nodes = rng.permutation(topology.num_nodes)
    return np.concatenate([node * size + rng.permutation(size) for node in nodes])
