"""Plans for the ranks that live: every expert alive, nothing of the ranks that are gone, the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_eplb_affinity.dispatch.primaries import primaries_of
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, plan
from sglang_eplb_affinity.planner.living_ranks import GONE_SLOT, LivingRanks
from sglang_eplb_affinity.rebalance.layer_moves import static_choice
from tests.planner.windows import RELAXED, skewed_tokens, window_of


@st.composite
def faults(draw: st.DrawFn):  # type: ignore[no-untyped-def]
    """(a window, the map in force, who lives) with slots enough on those."""
    nodes, per_node = draw(st.sampled_from([(1, 3), (1, 4), (2, 2), (2, 4)]))
    ranks = nodes * per_node
    alive = np.array(draw(st.lists(st.booleans(), min_size=ranks, max_size=ranks).filter(any)))
    experts = draw(st.integers(4, 12))
    slots = max(-(-experts // int(alive.sum())), draw(st.integers(1, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    slots = min(slots, experts)
    held = np.stack([rng.permutation(np.arange(ranks * slots) % experts) for _ in range(2)])
    window = window_of(skewed_tokens(rng, 2, 200, experts, 2), experts)
    return window, ExpertMap(held.astype(np.int32), experts), LivingRanks(alive, Topology(ranks, nodes))


@RELAXED
@given(faults(), st.sampled_from(["static", "cover", "cover_balanced", "primary"]))
def test_a_plan_for_the_living(fault, rule) -> None:  # type: ignore[no-untyped-def]
    window, in_force, living = fault
    slots = living.slots(in_force.num_slots)
    current = living.repaired(in_force.physical_to_logical, window.counts)
    before = in_force.physical_to_logical[:, slots]
    lost = [len(np.setdiff1d(np.arange(window.num_experts), row)) for row in before]
    # As few slots change as experts were lost, and every expert is there again (ExpertMap refuses others).
    assert (current.physical_to_logical != before).sum(1).tolist() == lost
    config = PlannerConfig(dispatch=rule, minimum_gain=0.02, threads=1)
    planned = plan(window, living.topology, len(slots), config, current).expert_map
    again = plan(window, living.topology, len(slots), config, current).expert_map
    assert (planned.physical_to_logical == again.physical_to_logical).all()
    whole = living.whole_rows(planned)
    assert whole.shape == in_force.physical_to_logical.shape
    assert (whole[:, slots] == planned.physical_to_logical).all()
    assert (np.delete(whole, slots, axis=1) == GONE_SLOT).all()
    assert (
        living.of_map(ExpertMap(whole, window.num_experts)).physical_to_logical == planned.physical_to_logical
    ).all()
    for layer, table in enumerate(planned.logical_to_all_physical()):
        named = living.whole_slots(table, whole.shape[1])
        choices = [named, living.whole_slots(static_choice(table, living.topology, len(slots)), whole.shape[1])]
        choices.append(living.whole_slots(primaries_of(table[None], living.topology, len(slots)), whole.shape[1]))
        for chosen in choices:
            assert np.isin(chosen[chosen >= 0], slots).all()
        assert (named >= 0).any(1).all() and ((named >= 0) == (table >= 0)).all()
        assert (whole[layer][choices[1]] == np.arange(window.num_experts)).all()
        assert (whole[layer][choices[2]] == np.arange(window.num_experts)).all()


def test_the_hottest_lost_expert_goes_where_its_gpu_carries_least() -> None:
    # Rank 2 is gone, and with it experts 4 and 5. Experts 0 and 1 have a replica on ranks 0 and 1 to give.
    whole = np.array([[0, 1, 2, 0, 1, 3, 4, 5, 4]], np.int32)
    living = LivingRanks(np.array([True, True, False]), Topology(3))
    counts = np.array([[8, 8, 40, 1, 30, 2]], np.int64)
    # GPU 1 carries less, also with expert 4, so its replicas give way.
    assert living.repaired(whole, counts).physical_to_logical.tolist() == [[0, 1, 2, 4, 5, 3]]
    assert living.whole_rows(living.repaired(whole, counts)).tolist() == [[0, 1, 2, 4, 5, 3, 0, 0, 0]]


def test_nodes_stay_where_each_that_is_left_has_as_many_ranks() -> None:
    def of(*alive: int) -> Topology:
        return LivingRanks(np.array(alive, bool), Topology(6, 3)).topology

    assert of(1, 1, 0, 0, 1, 1) == Topology(4, 2)
    assert of(1, 0, 0, 1, 1, 0) == Topology(3, 3)
    assert of(1, 1, 1, 0, 1, 1) == Topology(5, 1)


def test_too_few_slots_and_no_rank_are_named() -> None:
    living = LivingRanks(np.array([False, True, False]), Topology(3))
    with pytest.raises(InputError, match="ranks 0, 2 are gone: the others have 3 slots, which cannot hold 6 experts"):
        living.repaired(np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2]], np.int32), np.ones((1, 6), np.int64))
    with pytest.raises(InputError, match="0 alive"):
        LivingRanks(np.zeros(3, bool), Topology(3))
