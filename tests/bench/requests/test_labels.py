"""Labels of GPUs: free to choose in each layer, and aligned so that one rank is near a request in all layers."""

import numpy as np
import pytest

from bench.requests.labels import CopyCost, align_labels, dealt_evenly, held_by_gpu, nearness
from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology

TOPOLOGY = Topology(4, 2)
COST = CopyCost(0.2, 1.0)
LAYERS, EXPERTS = 5, 16


@pytest.fixture
def groups() -> np.ndarray:
    """int [layers, 4, 4]: the four experts of each kind of request, other ones in each layer."""
    rng = np.random.default_rng(3)
    return np.stack([rng.permutation(EXPERTS).reshape(4, 4) for _ in range(LAYERS)])


def map_of(groups: np.ndarray, seed: int) -> ExpertMap:
    """Each kind's experts on one GPU, kinds 0 and 1 on one node; labels of every layer are shuffled."""
    rng = np.random.default_rng(seed)
    rows = []
    for layer in groups:
        nodes = [layer[:2][rng.permutation(2)], layer[2:][rng.permutation(2)]]
        rows.append(np.concatenate([nodes[n].ravel() for n in rng.permutation(2)]))
    return ExpertMap(np.stack(rows), EXPERTS)


def signatures_of(groups: np.ndarray, requests: int) -> np.ndarray:
    out = np.zeros((requests, LAYERS, EXPERTS), np.float32)
    for request in range(requests):
        for layer in range(LAYERS):
            out[request, layer, groups[layer, request % 4]] = 1
    return out


def test_alignment_finds_the_rank_that_holds_all_of_a_requests_experts(groups: np.ndarray) -> None:
    signatures = signatures_of(groups, 12)
    aligned, ranks = align_labels(map_of(groups, 1), TOPOLOGY, signatures, COST, restarts=8)
    score = nearness(signatures, aligned, TOPOLOGY, COST)
    everything = LAYERS * 4 * (COST.gpu + COST.node)
    assert score.max(1) == pytest.approx(np.full(12, everything))
    assert (score.argmax(1) == ranks).all()
    assert np.bincount(ranks).tolist() == [3, 3, 3, 3]


def test_alignment_keeps_nodes_together_and_changes_neither_fanout_nor_load(groups: np.ndarray) -> None:
    before = map_of(groups, 2)
    after, _ = align_labels(before, TOPOLOGY, signatures_of(groups, 8), COST)
    tokens = np.random.default_rng(0).permuted(np.tile(np.arange(EXPERTS, dtype=np.int16), (LAYERS, 64, 1)), axis=2)
    old, new = (measure(tokens[:, :, :4], m, TOPOLOGY, "cover", None) for m in (before, after))
    assert (old.gpu_fanout == new.gpu_fanout).all()
    assert (old.node_fanout == new.node_fanout).all()
    assert (np.sort(old.gpu_load, 1) == np.sort(new.gpu_load, 1)).all()


def test_nearness_counts_what_a_rank_and_its_node_hold() -> None:
    expert_map = ExpertMap(np.array([[0, 1, 2, 3]]), 4)  # one expert on each of 4 GPUs of 2 nodes
    score = nearness(np.array([[[1.0, 0, 0, 2.0]]], np.float32), expert_map, TOPOLOGY, COST)
    assert score[0] == pytest.approx([1.2, 1.0, 2.0, 2.4])
    assert held_by_gpu(expert_map, TOPOLOGY)[0].tolist() == np.eye(4).tolist()


def test_no_rank_gets_more_than_its_share() -> None:
    score = np.zeros((7, 3))
    score[:, 1] = 5  # all want rank 1
    assert np.bincount(dealt_evenly(score)).max() == 3
