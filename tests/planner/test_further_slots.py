"""Which slots besides the primaries small passes use."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_eplb_affinity.dispatch.evaluate import dealt_sources, measure
from sglang_eplb_affinity.dispatch.numba_rules import static_slots
from sglang_eplb_affinity.dispatch.primaries import active_replicas, primaries_of
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, plan
from sglang_eplb_affinity.planner.even_primaries import primaries_first
from sglang_eplb_affinity.planner.further_slots import further_slots_of, with_further_first
from tests.planner.test_even_primaries import window

WEIGHT = 2


def some_row(rng: np.random.Generator, topology: Topology, experts: int, more: int) -> np.ndarray:
    """Slots with an even choice of primaries, and ``more`` others on each GPU, no expert twice on one."""
    share, rows = experts // topology.num_gpus, []
    for own in rng.permutation(experts).reshape(topology.num_gpus, share):
        rows.append(np.r_[own, rng.choice(np.setdiff1d(np.arange(experts), own), more, replace=False)])
    return np.concatenate([rng.permutation(row) for row in rows]).astype(np.int32)


def received(row: np.ndarray, active: np.ndarray, counts: np.ndarray, topology: Topology) -> np.ndarray:
    """What each GPU gets if its sources are alike and ``active`` [slots] are used, by the table of ``static``."""
    table = ExpertMap(row[None], len(counts)).logical_to_all_physical()[0]
    used = [[slot for slot in slots if slot >= 0 and active[slot]] for slots in table]
    width = max(map(len, used))
    padded = np.array([slots + [-1] * (width - len(slots)) for slots in used], np.int32)
    per_gpu, gpus = len(row) // topology.num_gpus, np.arange(topology.num_gpus)
    of = static_slots(padded, (padded >= 0).sum(1).astype(np.int32), len(gpus), per_gpu, topology.gpus_per_node)
    to = of // per_gpu
    far = to // topology.gpus_per_node != gpus[:, None] // topology.gpus_per_node
    return np.bincount(to.ravel(), (np.where(far, WEIGHT, 1.0) * counts).ravel(), len(gpus))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_single_exchange_would_be_better(data: st.DataObject) -> None:
    nodes = data.draw(st.sampled_from([1, 2, 4]))
    topology = Topology(nodes * data.draw(st.sampled_from([1, 2, 4])), nodes)
    experts = topology.num_gpus * data.draw(st.integers(2, 4))
    more = data.draw(st.integers(2, min(4, experts - experts // topology.num_gpus) or 2))
    if topology.num_gpus == 1:
        return
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    counts = np.exp(rng.normal(5, 1, experts)).astype(np.int64)
    row = primaries_first(some_row(rng, topology, experts, more), counts, topology)
    further = data.draw(st.integers(1, more - 1))
    ordered = with_further_first(row, counts, topology, further, WEIGHT)
    per_gpu = len(row) // topology.num_gpus
    assert (np.sort(row.reshape(-1, per_gpu)) == np.sort(ordered.reshape(-1, per_gpu))).all()
    assert (with_further_first(ordered, counts, topology, further, WEIGHT) == ordered).all()
    table = ExpertMap(ordered[None], experts).logical_to_all_physical()
    primary = primaries_of(table, topology, len(row))[0]
    assert set(primary.tolist()) == set(
        primaries_of(ExpertMap(row[None], experts).logical_to_all_physical(), topology, len(row))[0].tolist()
    )
    slots = active_replicas(table, topology, len(row), further)
    active = np.zeros(len(row), bool)
    active[slots[slots >= 0]] = True
    assert (active.reshape(-1, per_gpu).sum(1) == experts // topology.num_gpus + further).all()
    least = (received(ordered, active, counts, topology) ** 2).sum()
    others = np.ones(len(row), bool)
    others[primary] = False
    for gpu in range(topology.num_gpus):
        of_gpu = others & (np.arange(len(row)) // per_gpu == gpu)
        for out in np.flatnonzero(of_gpu & active):
            for into in np.flatnonzero(of_gpu & ~active):
                changed = active.copy()
                changed[out], changed[into] = False, True
                assert (received(ordered, changed, counts, topology) ** 2).sum() >= least * (1 - 1e-9)


def test_a_hot_expert_gets_its_second_slot_on_the_other_node() -> None:
    # Four GPUs of two nodes. Expert 0, on GPU 0, is hot, and GPUs 1 to 3 have it too. GPU 0 may take expert 1, whose
    # primary is on its node, or 2, whose primary is not.
    row = np.array([0, 4, 1, 2, 1, 5, 4, 0, 2, 6, 7, 0, 3, 7, 6, 0], np.int32)
    counts = np.array([1000, 10, 10, 10, 10, 10, 10, 10])
    topology = Topology(4, 2)
    primary = primaries_of(ExpertMap(row[None], 8).logical_to_all_physical(), topology, 16)[0]
    assert primary.tolist() == [0, 4, 8, 12, 1, 5, 9, 13]  # two of each GPU, in front
    chosen = further_slots_of(row, primary, counts, topology, 1, WEIGHT)
    assert {int(row[slot]) for slot in chosen[2:, 0]} == {0}  # both GPUs of the other node take its tokens in turn
    assert row[chosen[1, 0]] == 0
    moved = with_further_first(row, counts, topology, 1, WEIGHT)
    assert moved.tolist() == [0, 4, 2, 1, 1, 5, 0, 4, 2, 6, 0, 7, 3, 7, 0, 6]
    table = ExpertMap(moved[None], 8).logical_to_all_physical()
    assert active_replicas(table, topology, 16, 1)[0, 0].tolist() == [0, 6, 10, 14]
    assert active_replicas(table, topology, 16, 0)[0, 0].tolist() == [0, -1, -1, -1]
    assert (active_replicas(table, topology, 16, 2) == table).all()


def test_a_plan_with_further_slots_sends_less_over_the_slow_link() -> None:
    topology, recorded = Topology(8, 4), window(64, 8, 3, 4000)
    assert recorded.tokens is not None
    with_one = plan(recorded, topology, 96, PlannerConfig(dispatch="primary", further_slots=1, threads=1)).expert_map
    without = plan(recorded, topology, 96, PlannerConfig(dispatch="primary", threads=1)).expert_map
    by_gpu = (-1, topology.slots_per_gpu(96))
    a, b = (np.sort(m.physical_to_logical[0].reshape(by_gpu)) for m in (with_one, without))
    assert (a == b).all()  # the same experts on every GPU
    held_out = window(64, 8, 3, 8000).tokens[:, 4000:]  # type: ignore[index]
    source = dealt_sources(held_out.shape[1], topology)

    def figures(expert_map: ExpertMap, further: int) -> tuple[float, float, float]:
        found = measure(held_out, expert_map, topology, "primary", source, pass_tokens=64, further_slots=further)
        return float(found.expert_node_copies[0]), float(found.load_max_over_mean[0]), float(found.pass_active_slots[0])

    chosen, in_order, none = figures(with_one, 1), figures(without, 1), figures(without, 0)
    assert chosen[0] < 0.97 * in_order[0] < in_order[0] < none[0]
    assert chosen[1] < none[1]
    assert none[2] == 8 and chosen[2] == in_order[2] == 9
    everything = measure(held_out, with_one, topology, "static", source).expert_node_copies[0]
    assert figures(with_one, 4)[0] == everything


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"further_slots": 1}, "further_slots=1 needs dispatch primary"),
        ({"further_slots": -1, "dispatch": "primary"}, "further_slots=-1 must be 0 or more"),
    ],
)
def test_settings_that_cannot_be_meant(flags: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        PlannerConfig(**flags)  # type: ignore[arg-type]
