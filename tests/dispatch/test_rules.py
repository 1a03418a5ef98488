"""The dispatch rules: the torch reference by hand-made cases, and the fast evaluation against the reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.dispatch.numba_rules import static_slots
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, choose_replicas, dispatch_trace
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology

torch = pytest.importorskip("torch", reason="the reference is written in torch")


def random_map(rng: np.random.Generator, layers: int, experts: int, slots: int) -> ExpertMap:
    rows = [np.concatenate([np.arange(experts), rng.integers(0, experts, slots - experts)]) for _ in range(layers)]
    return ExpertMap(np.stack([rng.permutation(row) for row in rows]).astype(np.int32), experts)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(DISPATCH_RULES), st.booleans())
def test_evaluation_equals_the_torch_reference(seed, rule, with_source):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    topology = Topology(8, int(rng.choice([1, 2, 4])))
    experts, slots, layers, count = 24, 40, 2, 90
    k = int(rng.integers(1, 9))
    expert_map = random_map(rng, layers, experts, slots)
    ids = np.argsort(rng.random((count, layers, experts)), axis=-1)[..., :k].astype(np.int16)
    source = rng.integers(0, 8, count).astype(np.int32) if with_source else None
    physical = dispatch_trace(ids, expert_map, topology, rule, source)
    gpu = physical // 5
    node = gpu // topology.gpus_per_node
    traffic = measure(ids.transpose(1, 0, 2), expert_map, topology, rule, source)
    for layer in range(layers):
        assert (np.take(expert_map.physical_to_logical[layer], physical[:, layer]) == ids[:, layer]).all()
        gpus = [set(row.tolist()) for row in gpu[:, layer]]
        nodes = [set(row.tolist()) for row in node[:, layer]]
        assert traffic.gpu_fanout[layer] == pytest.approx(np.mean([len(s) for s in gpus]))
        assert traffic.node_fanout[layer] == pytest.approx(np.mean([len(s) for s in nodes]))
        assert (traffic.gpu_load[layer] == np.bincount(gpu[:, layer].ravel(), minlength=8)).all()
        if source is not None:
            home = source // topology.gpus_per_node
            remote = [len(s - {int(h)}) for s, h in zip(nodes, home, strict=True)]
            assert traffic.remote_node_copies[layer] == pytest.approx(np.mean(remote))
            remote = [len(s - {int(g)}) for s, g in zip(gpus, source, strict=True)]
            assert traffic.remote_gpu_copies[layer] == pytest.approx(np.mean(remote))
            assert traffic.expert_node_copies[layer] == pytest.approx((node[:, layer] != home[:, None]).sum(1).mean())


@pytest.mark.parametrize("with_source", [False, True])
def test_each_pass_is_balanced_by_itself(with_source):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(5)
    topology, per_gpu, gpus = Topology(4, 2), 10, 4
    count = 3 * per_gpu * gpus + 7  # the last pass is not complete
    expert_map = random_map(rng, 1, 16, 28)
    table = torch.from_numpy(expert_map.logical_to_all_physical()[0])
    ids = np.argsort(rng.random((count, 16)), axis=-1)[:, :4].astype(np.int16)
    source = np.arange(count, dtype=np.int32) % gpus if with_source else None
    traffic = measure(ids[None], expert_map, topology, "cover_balanced", source, pass_tokens=per_gpu)
    loads, active = [], []
    for first in range(0, count, per_gpu * gpus):
        rows = slice(first, first + per_gpu * gpus)
        where = None if source is None else torch.from_numpy(source[rows])
        physical = choose_replicas(torch.from_numpy(ids[rows]), table, topology, 28, "cover_balanced", where, first)
        loads.append(np.bincount(physical.numpy().ravel() // 7, minlength=gpus))
        active.append((np.bincount(physical.numpy().ravel(), minlength=28).reshape(gpus, 7) > 0).sum(1).max())
    assert (traffic.gpu_load[0] == np.sum(loads, axis=0)).all()
    complete = [load.max() / load.mean() for load in loads[:3]]
    assert traffic.pass_load_max_over_mean[0] == pytest.approx(np.mean(complete))
    assert traffic.pass_active_slots[0] == pytest.approx(np.mean(active[:3]))


@pytest.mark.parametrize("source", [None, 3])
def test_balanced_cover_lowers_the_load_of_its_pass_and_keeps_the_fanout(source):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(7)
    topology, experts, slots = Topology(8, 2), 64, 128
    expert_map = ExpertMap(rng.permutation(np.r_[np.arange(64), np.arange(64)])[None].astype(np.int32), experts)
    popular = rng.gamma(0.7, size=experts)
    ids = np.argsort(-np.log(popular) - rng.gumbel(size=(400, experts)))[:, :8].astype(np.int16)
    where = None if source is None else np.full(400, source, np.int32)
    cover, balanced = (
        measure(ids[None], expert_map, topology, rule, where)
        for rule in ("cover", "cover_balanced")  # type: ignore[arg-type]
    )
    assert expert_map.num_slots == slots
    assert balanced.load_max_over_mean[0] - 1 < 0.75 * (cover.load_max_over_mean[0] - 1)
    assert balanced.gpu_fanout[0] < 1.04 * cover.gpu_fanout[0]


def test_few_tokens_and_none_are_served():
    slots, topology = [0, 1, 0, 2], Topology(2)
    assert choose([[-1, -1]], slots, topology, source=1, rule="cover_balanced") == [[-1, -1]]
    assert choose([[0, 1]], slots, topology, source=1, rule="cover_balanced") == [[0, 1]]  # where 1 is anyway
    table = torch.tensor([[0, 2], [1, -1], [3, -1]])
    none = choose_replicas(torch.empty(0, 2, dtype=torch.long), table, topology, 4, "cover_balanced", 0)
    assert none.shape == (0, 2)


@pytest.mark.parametrize("rule", ["cover", "cover_balanced", "dynamic"])
def test_ranks_deviate_independently(rule):  # type: ignore[no-untyped-def]
    # One token on each of 64 ranks, for an expert with 4 replicas elsewhere: all ranks have row 0.
    expert_map = ExpertMap(np.r_[np.zeros(4), np.arange(1, 61)][None].astype(np.int32), 61)
    table = torch.from_numpy(expert_map.logical_to_all_physical()[0])
    topology = Topology(64, 64)
    ids = torch.tensor([[0]])
    chosen = [int(choose_replicas(ids, table, topology, 64, rule, source)[0, 0]) for source in range(4, 64)]
    assert np.bincount(chosen, minlength=4).max() < 2 * 60 / 4


def choose(rows: list[list[int]], slots: list[int], topology: Topology, source: int | None, rule: str = "cover"):  # type: ignore[no-untyped-def]
    expert_map = ExpertMap(np.array([slots], np.int32), max(slots) + 1)
    table = torch.from_numpy(expert_map.logical_to_all_physical()[0])
    return choose_replicas(torch.tensor(rows), table, topology, len(slots), rule, source).tolist()  # type: ignore[arg-type]


def test_cover_prefers_visited_gpu_then_visited_node_then_source():
    # Four GPUs on two nodes, three slots each. Expert 0 sits on GPUs 1, 2 and 3, the others once.
    slots = [1, 2, 3, 0, 4, 5, 0, 6, 7, 0, 8, 9]
    topology = Topology(4, 2)
    assert choose([[0, 8]], slots, topology, source=0) == [[9, 10]]  # 8 is on GPU 3: so is a replica of 0
    assert choose([[0, 1]], slots, topology, source=3) == [[3, 0]]  # GPU 0 has none, its node has one on GPU 1
    assert choose([[0]], slots, topology, source=2) == [[6]]  # nothing visited: the source GPU
    assert choose([[0]], slots, topology, source=0) == [[3]]  # the source node
    assert choose([[0, -1]], slots, topology, source=0) == [[3, -1]]  # padding stays


def test_ties_spread_evenly_by_hash():
    slots = [0, 1, 0, 2]
    chosen = np.array(choose([[0]] * 4000, slots, Topology(2), source=None))
    share = (chosen == 0).mean()
    assert 0.46 < share < 0.54
    assert chosen.tolist() == choose([[0]] * 4000, slots, Topology(2), source=None)


def test_dynamic_ignores_the_other_experts_and_static_follows_the_source():
    slots = [0, 1, 0, 2]
    chosen = np.array(choose([[0, 1]] * 1000, slots, Topology(2), source=0, rule="dynamic"))[:, 0]
    assert 0.4 < (chosen == 0).mean() < 0.6
    assert choose([[0, 1]], slots, Topology(2), source=1, rule="static") == [[2, 1]]


def test_static_deals_sources_out_evenly():
    # Expert 0 sits on GPUs 0 and 2 of four: GPUs 1 and 3 must not both go to the same replica.
    slots = [0, 1, 2, 3, 0, 4, 5, 6]
    served = [choose([[0]], slots, Topology(4), source=gpu, rule="static")[0][0] for gpu in range(4)]
    assert (served[0], served[2]) == (0, 4) and {served[1], served[3]} == {0, 4}
    # On two nodes a GPU stays on its own.
    served = [choose([[0]], slots, Topology(4, 2), source=gpu, rule="static")[0][0] for gpu in range(4)]
    assert served == [0, 0, 4, 4]


@pytest.mark.parametrize("sizes", [(8, 1), (8, 2), (8, 4)])
def test_no_replica_serves_two_sources_more_than_another(sizes):  # type: ignore[no-untyped-def]
    topology = Topology(*sizes)
    rng = np.random.default_rng(4)
    slots = rng.permutation(np.r_[np.arange(16), rng.integers(0, 16, 16)]).astype(np.int32)
    table = ExpertMap(slots[None], 16).logical_to_all_physical()[0]
    counts = (table >= 0).sum(1).astype(np.int32)
    served = static_slots(table, counts, topology.num_gpus, 4, topology.gpus_per_node)
    for expert in range(16):
        replicas = table[expert, : counts[expert]]
        nodes = replicas // 4 // topology.gpus_per_node
        of_gpu = np.arange(topology.num_gpus) // topology.gpus_per_node
        near = np.isin(of_gpu, nodes)
        own = np.isin(np.arange(topology.num_gpus), replicas // 4)
        assert (served[own, expert] // 4 == np.flatnonzero(own)).all()
        groups = [~own & near & (of_gpu == node) for node in range(topology.num_nodes)] + [~own & ~near]
        for node, group in enumerate(groups):
            choices = replicas[nodes == node] if node < topology.num_nodes else replicas
            dealt = [(served[group, expert] == replica).sum() for replica in choices]
            assert sum(dealt) == group.sum() and (not dealt or max(dealt) - min(dealt) <= 1)


def test_unknown_rule_is_named():
    with pytest.raises(InputError, match="nearest"):
        choose([[0]], [0, 1], Topology(2), source=0, rule="nearest")
