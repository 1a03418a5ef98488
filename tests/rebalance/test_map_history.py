"""Promise and delivery from round to round, and going back to a layer's best map."""

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.recorded_map import MapOrigin, ServedModel, origin_of
from sglang_eplb_affinity.planner import PlannerConfig
from sglang_eplb_affinity.planner.block_spread import Excess
from sglang_eplb_affinity.planner.layer_figures import FIGURES, LayerFigures
from sglang_eplb_affinity.rebalance.going_back import with_best_maps
from sglang_eplb_affinity.rebalance.map_history import EARLIER_WINDOWS, HOLD_ROUNDS, Judging, MapHistory, compare
from sglang_eplb_affinity.rebalance.map_recorder import MapRecorder
from sglang_eplb_affinity.rebalance.metrics import PlacementMetrics
from sglang_eplb_affinity.rebalance.plan_round import PlanReply, PlanRequest, PlanSettings, next_history, plan_round
from sglang_eplb_affinity.rebalance.round_record import RoundRecord

EXPERTS, GPUS = 8, 4
SETTINGS = PlanSettings("affinity", PlannerConfig(minimum_gain=0.02, threads=1), Topology(GPUS))
JUDGED = SETTINGS.topology, SETTINGS.planner
JUDGING = Judging(SETTINGS.topology, SETTINGS.planner, by_cost=True)
NEXT, FAR = np.arange(EXPERTS), np.array([0, 2, 4, 6, 1, 3, 5, 7])  # partners share a GPU; partners two GPUs apart


def window(shift: int, seed: int, tokens: int = 1024, spoil: float = 0.1) -> RoutingWindow:
    """Experts e and e + 1 (shift 1) or e and e + 2 (shift 2) fire together, but for a random share; 2 layers."""
    random = np.random.default_rng(seed)
    first = random.integers(0, EXPERTS // 2, (tokens, 2)) * 2
    if shift == 2:
        first = np.array([0, 1, 4, 5])[first // 2]
    ids = np.stack([first, first + shift], 2)
    spoilt = random.random((tokens, 2)) < spoil
    ids[spoilt, 1] = (ids[spoilt, 0] + random.integers(1, EXPERTS, spoilt.sum())) % EXPERTS
    return RoutingWindow.from_trace(RoutingTrace(ids.astype(np.int16), EXPERTS))


def both_layers(row: np.ndarray) -> ExpertMap:
    return ExpertMap(np.tile(row, (2, 1)), EXPERTS)


def round_of(current: ExpertMap, found: RoutingWindow, history: MapHistory | None, **planner: object) -> PlanReply:
    plans = replace(SETTINGS, planner=replace(SETTINGS.planner, **planner))  # type: ignore[arg-type]
    return plan_round(PlanRequest(found, current, plans, history=history))


def applied(current: ExpertMap, reply: PlanReply) -> ExpertMap:
    rows = current.physical_to_logical.copy()
    for layer in reply.layers:
        rows[layer.layer] = layer.slots
    return ExpertMap(rows, current.num_experts)


def test_each_round_says_what_became_of_the_promise_before() -> None:
    first = round_of(both_layers(FAR), window(1, 0), None)
    assert first.result == "planned" and first.history is not None and first.delivery is not None
    assert first.delivery.promised is first.delivery.previous_map is None
    current = applied(both_layers(FAR), first)
    assert np.array_equal(first.history.in_force, current.physical_to_logical)
    second = round_of(current, window(1, 1), first.history)
    assert second.delivery is not None and second.delivery.promised is not None
    assert np.array_equal(second.delivery.promised.cost, first.history.promised.cost)
    means = {name: figures.means() for name, figures in second.delivery.figures()}
    assert means["promised"]["gpu_fanout"] == pytest.approx(means["delivered"]["gpu_fanout"], rel=0.05)
    assert means["previous_map"]["gpu_fanout"] > 1.5 * means["delivered"]["gpu_fanout"]
    assert second.delivery.returned == () and np.allclose(second.delivery.regret, 0)


def test_a_layer_whose_map_is_not_what_was_planned_has_no_promise() -> None:
    first = round_of(both_layers(FAR), window(1, 0), None)
    rows = both_layers(FAR).physical_to_logical.copy()
    rows[0] = applied(both_layers(FAR), first).physical_to_logical[0]  # layer 1 failed to move
    found = compare(first.history, window(1, 1), ExpertMap(rows, EXPERTS), JUDGING)
    assert found is not None and found.delivery.promised is not None
    assert np.isfinite(found.delivery.promised.cost).tolist() == [True, False]


def after_a_bad_move(seed: int = 0) -> tuple[ExpertMap, MapHistory]:
    """FAR is in force, put there on the promise of a window of shift 2; NEXT was there before, and is the best."""
    good, bad = both_layers(NEXT), both_layers(FAR)
    found = compare(None, window(1, seed), good, JUDGING)
    assert found is not None
    return bad, next_history(found, window(1, seed), good, bad, SETTINGS)


def test_a_layer_that_delivers_less_goes_back_and_the_round_says_why() -> None:
    bad, history = after_a_bad_move()
    reply = round_of(bad, window(1, 5), history)
    assert reply.delivery is not None and reply.delivery.returned == (0, 1)
    assert np.array_equal(applied(bad, reply).physical_to_logical, both_layers(NEXT).physical_to_logical)
    assert (reply.delivery.regret > 0.3).all()
    assert reply.reason is not None and reply.reason.startswith("2 layers go back to their best map, against which")
    assert "layer 0 cost +" in reply.reason
    # The round after promises what the best map gave, and the map that was left is held.
    assert reply.history is not None and (reply.history.hold == 2 * HOLD_ROUNDS).all()
    found = compare(reply.history, window(1, 6), both_layers(NEXT), JUDGING)
    assert found is not None and found.held(bad.physical_to_logical).all() and not found.back.any()


def test_going_back_keeps_to_the_room_for_moves() -> None:
    bad, history = after_a_bad_move()
    reply = round_of(bad, window(1, 5), history, max_moves=1)
    assert reply.delivery is not None and reply.delivery.returned == ()


def test_no_layer_goes_back_to_a_map_that_loses_more_with_a_rank() -> None:
    """Every expert is on two ranks in force, and under the best map experts 6 and 7 on one only."""
    safe = np.array([0, 1, 2, 3, 4, 5, 6, 7] * 2)
    best = np.array([0, 1, 2, 6, 3, 4, 5, 7, 0, 1, 2, 3, 4, 5, 0, 1])
    found = window(1, 3)
    in_force = both_layers(safe)
    history = MapHistory.starting(in_force, LayerFigures.of(found, both_layers(best).physical_to_logical, *JUDGED))  # type: ignore[arg-type]
    history = replace(history, best=both_layers(best).physical_to_logical)
    comparison = compare(history, found, in_force, JUDGING)
    assert comparison is not None
    comparison = replace(comparison, best=history.best, back=np.array([False, True]), excesses={1: Excess(1, 1, 0, 0)})
    for survive, returned in (("none", (1,)), ("rank", ())):
        after, judged, _ = with_best_maps(
            in_force,
            in_force,
            comparison,
            found.counts,
            SETTINGS.topology,
            survive,
            None,  # type: ignore[arg-type]
        )
        assert judged.delivery.returned == returned
        assert np.array_equal(after.physical_to_logical[1], best if returned else safe)


def test_a_map_that_gives_more_becomes_the_best() -> None:
    bad, history = after_a_bad_move()
    found = compare(history, window(2, 7), bad, JUDGING)
    assert found is not None and not found.back.any() and np.allclose(found.delivery.regret, 0)
    assert np.array_equal(found.best, bad.physical_to_logical)


def test_too_few_tokens_tell_nothing() -> None:
    bad, history = after_a_bad_move()
    found = compare(history, window(1, 5, tokens=40), bad, JUDGING)
    assert found is not None and not found.back.any() and (found.delivery.regret > 0).all()


def test_judging_and_going_back_launch_nothing_on_a_device() -> None:
    class Launches(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    bad, history = after_a_bad_move()
    with Launches() as launches:
        reply = round_of(bad, window(1, 5), history)
        PlacementMetrics({}, SETTINGS.topology, bad, CollectorRegistry()).round_finished(
            RoundRecord("applied", "affinity", 1, delivery=reply.delivery, history=reply.history), bad
        )
        assert not launches.seen
        torch.zeros(1).add_(1)
        assert launches.seen  # it would have seen one


def origin(**fields: object) -> MapOrigin:
    model = ServedModel("org/model", "Qwen3MoeForCausalLM", 2, EXPERTS, 2)
    return MapOrigin(model, SETTINGS.topology, EXPERTS, "affinity", "cover", 1, "", "0", "0", **fields)  # type: ignore[arg-type]


def test_a_restart_goes_on_with_the_recorded_figures(tmp_path: Path) -> None:
    bad, history = after_a_bad_move()
    path = tmp_path / "map.json"
    MapRecorder(path, origin()).round_finished(RoundRecord("applied", "affinity", 1, history=history), bad)
    data = json.loads(path.read_text())
    loaded = ExpertMap.from_json(data, EXPERTS, source="file")
    read = origin_of(data, loaded, "file")
    assert read is not None
    found = MapHistory.of_file(loaded, read, "file")
    assert found is not None and np.allclose(found.promised.cost, history.promised.cost)
    assert np.array_equal(found.best, history.best)
    # What the server before would have done at its next round, this one does at its first.
    reply = round_of(loaded, window(1, 5), found)
    assert reply.delivery is not None and reply.delivery.returned == (0, 1)
    assert reply.delivery.promised is not None and reply.delivery.best_map is not None


def test_a_file_without_figures_or_with_wrong_ones() -> None:
    current = both_layers(NEXT)
    assert MapHistory.of_file(current, origin(), "file") is None
    figures = {name: [1.0, None] for name in FIGURES}
    assert MapHistory.of_file(current, origin(promised=figures, best_map=figures), "file") is not None
    short = {name: [1.0] for name in FIGURES}
    for wrong in ({"promised": short}, {"best_map": {}}, {"best_slots": [[0] * EXPERTS] * 2}, {"best_slots": [[0]]}):
        fields = {"promised": figures, "best_map": figures, **wrong}
        with pytest.raises(InputError, match=r"file: its entry eplb_affinity has figures that do not fit the map"):
            MapHistory.of_file(current, origin(**fields), "file")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.sampled_from([128, 512, 1024]), swap=st.booleans())
def test_chance_makes_no_two_maps_alternate(seed: int, tokens: int, swap: bool) -> None:
    """Two maps that are equally good for uniform traffic, the one that is in force always said to be the newer."""
    one, other = both_layers(NEXT), both_layers(FAR)
    if swap:
        one, other = other, one
    found = compare(None, window(1, seed, tokens, spoil=1.0), one, JUDGING)
    assert found is not None
    history, current = next_history(found, window(1, seed, tokens, spoil=1.0), one, other, SETTINGS), other
    changes = 0
    for number in range(12):
        seen = window(1, seed + 1 + number, tokens, spoil=1.0)
        found = compare(history, seen, current, JUDGING)
        assert found is not None
        after = ExpertMap(np.where(found.back[:, None], found.best, current.physical_to_logical), EXPERTS)
        changes += int(found.back.sum())
        history = next_history(replace_returned(found), seen, current, after, SETTINGS)
        current = after
    assert changes <= 2  # each of the two layers at most once, which is a return and no alternation


def replace_returned(found):  # type: ignore[no-untyped-def]
    returned = tuple(np.flatnonzero(found.back).tolist())
    return replace(found, delivery=replace(found.delivery, returned=returned))


def of_topics(share: float, seed: int, tokens: int = 2048) -> RoutingWindow:
    """16 experts in pairs that fire together; a token takes two pairs of its topic, of two topics; one layer."""
    random = np.random.default_rng(seed)
    topic = random.random(tokens) < share
    pairs = np.array([random.permutation(4)[:2] for _ in range(tokens)]) + 4 * topic[:, None]
    ids = np.stack([2 * pairs, 2 * pairs + 1], 2).reshape(tokens, 1, 4)
    return RoutingWindow.from_trace(RoutingTrace(ids.astype(np.int16), 16))


def day_of_topics(shift_weight: float) -> tuple[ExpertMap, MapHistory]:
    """After rounds whose windows lean to one topic and to the other in turn, the last to neither."""
    current, history = ExpertMap.contiguous(1, 16, 16), None
    for number, share in enumerate((0.2, 0.8, 0.2, 0.8, 0.5)):
        reply = round_of(current, of_topics(share, number), history, shift_weight=shift_weight, warm_start=number > 0)
        current, history = applied(current, reply), reply.history
    assert history is not None
    return current, history


def test_a_plan_heeds_what_load_was_in_earlier_windows() -> None:
    served = of_topics(0.9, 9)

    def load(expert_map: ExpertMap) -> float:
        found = LayerFigures.of(served, expert_map.physical_to_logical, *JUDGED)
        assert found is not None
        return float(found.load[0])

    (free, _), (careful, history) = (day_of_topics(weight) for weight in (0.0, PlannerConfig.shift_weight))
    assert history.shares is not None and history.shares.shape == (EARLIER_WINDOWS, 1, 16)
    assert load(careful) < 1.3 < load(free)


def test_a_server_remembers_a_bounded_number_of_windows() -> None:
    history = None
    for number in range(EARLIER_WINDOWS + 3):
        found = window(1, number)
        history = round_of(both_layers(NEXT), found, history).history
    assert history is not None and history.shares is not None and len(history.shares) == EARLIER_WINDOWS
    assert np.array_equal(history.shares[-1], found.shares())
    other = ExpertMap.contiguous(2, EXPERTS, EXPERTS + GPUS)  # another server's slots: what it remembers says nothing
    assert round_of(other, window(1, 50), history).history.shares.shape[0] == 1  # type: ignore[union-attr]
