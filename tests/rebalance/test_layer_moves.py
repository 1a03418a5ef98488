"""Sources, jobs and tables of one layer's change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_eplb_affinity.dispatch.rules import choose_replicas
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.rebalance.layer_moves import choose_sources, job_of, layer_plan, static_choice


def test_a_replica_on_the_same_gpu_is_taken_first_then_one_on_the_node() -> None:
    topology = Topology(4, 2)  # 2 slots a GPU, 2 GPUs a node
    old = np.array([0, 1, 2, 3, 0, 1, 0, 2])
    new = np.array([0, 0, 0, 3, 0, 3, 0, 2])
    #              keep, GPU 0 has 0, node has 0 at slot 0, ..., 3 is on the other node only
    assert choose_sources(old, new, topology).tolist() == [-1, 0, 0, -1, -1, 3, -1, -1]


def test_replicas_of_a_hot_expert_are_pulled_from_different_gpus() -> None:
    old = np.array([0, 1, 0, 2, 3, 4, 5, 6])
    new = np.array([0, 1, 0, 2, 0, 4, 0, 6])
    assert choose_sources(old, new, Topology(4)).tolist() == [-1, -1, -1, -1, 0, -1, 2, -1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(2, 1), (4, 1), (4, 2)]), st.integers(0, 2))
def test_jobs_of_all_ranks_together_make_the_new_layer(seed: int, sizes: tuple[int, int], redundant: int) -> None:
    random = np.random.default_rng(seed)
    topology = Topology(*sizes)
    experts, local = 8, (8 + redundant * sizes[0]) // sizes[0]
    rows = [random.permutation(np.r_[np.arange(8), random.integers(0, 8, local * sizes[0] - 8)]) for _ in range(2)]
    old, new = (row.astype(np.int32) for row in rows)
    plan = layer_plan(3, old, new, experts, topology, "dynamic")
    before, after = old.reshape(-1, local), old.reshape(-1, local).copy()
    asked = []
    for rank in range(sizes[0]):
        job = job_of(plan, rank, local)
        for arrival in job.arrivals:
            after[rank, arrival.slot] = before[arrival.source_rank, arrival.source_slot]
            if arrival.source_rank != rank:
                asked.append((arrival.source_rank, arrival.source_slot, rank, arrival.slot))
    assert (after.ravel() == new).all() and job.layer == 3
    departures = [
        (rank, d.slot, d.target_rank, d.target_slot)
        for rank in range(sizes[0])
        for d in job_of(plan, rank, local).departures
    ]
    assert sorted(asked) == sorted(departures)
    assert (plan.source[old == new] == -1).all()
    assert (plan.replicas == ExpertMap(new[None], experts).logical_to_all_physical()[0]).all()


@pytest.mark.parametrize("sizes", [(4, 1), (4, 2), (8, 2)])
def test_static_choice_is_the_static_rule(sizes: tuple[int, int]) -> None:
    import torch

    topology = Topology(*sizes)
    random = np.random.default_rng(1)
    slots = random.permutation(np.r_[np.arange(12), random.integers(0, 12, 12)])
    table = ExpertMap(slots[None], 12).logical_to_all_physical()[0]
    found = static_choice(table, topology, len(slots))
    ids = torch.arange(12)[None]
    for rank in range(sizes[0]):
        expected = choose_replicas(ids, torch.from_numpy(table), topology, len(slots), "static", source_gpu=rank)
        assert (found[rank] == expected[0].numpy()).all()
