"""Our EPLB against its description and against SGLang's own code where it is installed."""

from __future__ import annotations

import numpy as np
import pytest

from bench.planner.upstream import upstream_map, upstream_rebalance
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import eplb_placement


def gpu_loads(counts: np.ndarray, placed: np.ndarray, gpus: int) -> np.ndarray:
    share = counts / np.bincount(placed, minlength=len(counts))
    return share[placed].reshape(gpus, -1).sum(1)


def test_published_example_balances():
    # The 12-expert example of the EPLB README: 16 slots, 4 groups, 2 nodes, 8 GPUs.
    counts = np.array(
        [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    )
    placed = eplb_placement(counts, Topology(8, 2), 16, hierarchical=True, num_groups=4).physical_to_logical
    assert placed.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("hierarchical", [False, True])
@pytest.mark.parametrize(("experts", "slots", "gpus", "nodes"), [(64, 64, 8, 2), (64, 80, 8, 2), (256, 288, 32, 4)])
def test_equals_sglang_for_untied_loads(hierarchical, experts, slots, gpus, nodes):  # type: ignore[no-untyped-def]
    rebalance = upstream_rebalance()
    if rebalance is None:
        pytest.skip("SGLang is not installed")
    rng = np.random.default_rng(experts + slots)
    # Distinct odd numbers: loads and their shares are untied.
    counts = np.stack([rng.permutation(np.arange(experts)) * 1009 + rng.integers(1, 500) * 2 + 1 for _ in range(4)])
    topology = Topology(gpus, nodes)
    ours = eplb_placement(counts, topology, slots, hierarchical=hierarchical).physical_to_logical
    theirs = upstream_map(rebalance, counts, topology, slots, hierarchical).physical_to_logical
    for layer in range(len(counts)):
        mine = gpu_loads(counts[layer], ours[layer], gpus)
        their = gpu_loads(counts[layer], theirs[layer], gpus)
        assert mine.max() == pytest.approx(their.max(), rel=1e-6)
    assert (np.sort(ours.reshape(4, gpus, -1)) == np.sort(theirs.reshape(4, gpus, -1))).all()


def test_sizes_that_do_not_divide():
    counts = np.ones((1, 10), np.int64)
    with pytest.raises(InputError, match="do not divide"):
        eplb_placement(counts, Topology(4), 10)
    with pytest.raises(InputError, match="groups"):
        eplb_placement(counts, Topology(4, 4), 12, hierarchical=True)
    with pytest.raises(InputError, match="cannot hold"):
        eplb_placement(counts, Topology(4), 8)
