"""Annealed search over which experts are replicated and where, for the dispatch rule ``cover``.

Two kinds of proposals: swap the contents of two slots of different GPUs; or turn one replica of an expert that has
several into a replica of another expert. A proposal changes the visits of the tokens that chose one of the two
experts, and these are evaluated exactly by the rule (token_service.py, cover_serving.py): first a part of them, which
refuses most proposals. Loads are only worked out for what passes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.planner.cover_serving import serve
from sglang_eplb_affinity.planner.imbalance import SHIFT
from sglang_eplb_affinity.planner.random_steps import next_random
from sglang_eplb_affinity.planner.token_service import LOAD_UNIT, collect, flip_gpus, keep, serve_all, try_load

PARTS = 4  # a proposal is first tried on one part of its tokens


class Places(NamedTuple):
    """slot_expert int32 [slots]; holds int64 [experts, gpus], 1 where a GPU holds it; replicas int64 [experts]."""

    slot_expert: np.ndarray
    holds: np.ndarray
    replicas: np.ndarray
    slots_per_gpu: int
    gpus_per_node: int
    num_nodes: int


@kernel
def _add_profile(places, profile, gpu_profile, e, sign):  # type: ignore[no-untyped-def]
    part = np.int32(256 // places.replicas[e])
    source = profile[e]
    for g in range(gpu_profile.shape[0]):
        if places.holds[e, g] > 0:
            row = gpu_profile[g]
            for c in range(row.shape[0]):
                row[c] += sign * (source[c] * part >> 8)


@kernel
def _squares(places, gpu_profile, squares, a, b):  # type: ignore[no-untyped-def]
    """Bring ``squares`` int64 [gpus] up to date where a or b is."""
    for g in range(squares.shape[0]):
        if places.holds[a, g] > 0 or places.holds[b, g] > 0:
            row = gpu_profile[g]
            total = np.int64(0)
            for c in range(row.shape[0]):
                total += np.int64(row[c]) * row[c]
            squares[g] = total


@kernel
def _price(load, balance, squares):  # type: ignore[no-untyped-def]
    """(imbalance cost, load over the cap)."""
    excess = np.int64(0)
    total = np.int64(0)
    for g in range(squares.shape[0]):
        here = load[g] >> LOAD_UNIT
        excess += max(here - balance.cap, 0)
        scaled = max(here - balance.free, 0) * balance.scale >> 20
        total += squares[g] + scaled * scaled
    return total * balance.weight >> SHIFT, excess


@kernel
def _spread(sample, places, costs, e):  # type: ignore[no-untyped-def]
    """What low latency saves by e's replicas on several nodes."""
    if costs.spread == 0:
        return np.int64(0)
    covered = np.int64(0)
    for n in range(places.num_nodes):
        here = 0
        for g in range(n * places.gpus_per_node, (n + 1) * places.gpus_per_node):
            here |= places.holds[e, g]
        covered += here
    return costs.spread * (sample.start[e + 1] - sample.start[e]) * (covered - 1) // places.num_nodes


@kernel
def _survives(places, unit, e):  # type: ignore[no-untyped-def]
    """Whether e is on two units of GPUs."""
    found = -1
    for g in range(places.holds.shape[1]):
        if places.holds[e, g] > 0:
            if found >= 0 and found != g // unit:
                return True
            found = g // unit
    return False


@kernel
def _exchange(places, s, r, a, b):  # type: ignore[no-untyped-def]
    """Slot s turns from a to b; slot r, if there is one, from b to a."""
    g = s // places.slots_per_gpu
    places.slot_expert[s] = b
    places.holds[a, g] = 0
    places.holds[b, g] = 1
    if r >= 0:
        h = r // places.slots_per_gpu
        places.slot_expert[r] = a
        places.holds[b, h] = 0
        places.holds[a, h] = 1
    else:
        places.replicas[a] -= 1
        places.replicas[b] += 1


@kernel
def _change_places(places, balance, gpu_profile, squares, s, r, a, b):  # type: ignore[no-untyped-def]
    """:func:`_exchange`, with the GPUs' profiles and their squares."""
    _add_profile(places, balance.profile, gpu_profile, a, np.int32(-1))
    _add_profile(places, balance.profile, gpu_profile, b, np.int32(-1))
    _squares(places, gpu_profile, squares, a, b)
    _exchange(places, s, r, a, b)
    _add_profile(places, balance.profile, gpu_profile, a, np.int32(1))
    _add_profile(places, balance.profile, gpu_profile, b, np.int32(1))
    _squares(places, gpu_profile, squares, a, b)


@kernel
def _even_load(places, served, even, a, b, g, h):  # type: ignore[no-untyped-def]
    """In tried_load, the load after a and b (of GPU h, or a new replica: -1) changed places, if replicas share evenly.

    even int64 [experts]: the expert's whole load, << LOAD_UNIT.
    """
    load = served.tried_load
    load[:] = served.load
    n_a = places.replicas[a]
    n_b = places.replicas[b]
    if h >= 0:
        shift = even[b] // n_b - even[a] // n_a
        load[g] += shift
        load[h] -= shift
        return
    for i in range(load.shape[0]):
        if places.holds[a, i] > 0:
            load[i] += even[a] // n_a - even[a] // (n_a + 1)
        if places.holds[b, i] > 0 and i != g:
            load[i] += even[b] // n_b - even[b] // (n_b - 1)
    load[g] += even[b] // n_b - even[a] // (n_a + 1)


@kernel
def search_replicas(  # type: ignore[no-untyped-def]
    sample, slot_expert, numbering, grid, costs, balance, moves, steps
):
    """Improve ``slot_expert`` int32 [slots] in place; returns (proposed, tried, accepted) int64.

    No GPU may hold an expert twice at the start. A proposal may not raise the load over the cap.
    Costs are integers: visits in tokens times weight.
    """
    slots_per_gpu, gpus_per_node, num_nodes = grid
    slots = slot_expert.shape[0]
    experts = sample.bits.shape[0]
    gpus = slots // slots_per_gpu
    places = Places(
        slot_expert, np.zeros((experts, gpus), np.int64), np.zeros(experts, np.int64), slots_per_gpu, gpus_per_node,
        num_nodes,
    )  # fmt: skip
    new_here = np.zeros(gpus, np.int64)
    for s in range(slots):
        e = slot_expert[s]
        g = s // slots_per_gpu
        places.holds[e, g] = 1
        places.replicas[e] += 1
        new_here[g] += 1 - moves.home[e, g]
    gpu_profile = np.zeros((gpus, balance.profile.shape[1]), np.int32)
    squares = np.zeros(gpus, np.int64)
    cost = costs.move * new_here.sum()
    for e in range(experts):
        _add_profile(places, balance.profile, gpu_profile, e, np.int32(1))
        cost -= _spread(sample, places, costs, e)
    for e in range(experts):
        _squares(places, gpu_profile, squares, e, e)
    served = serve_all(sample, places.holds, numbering, costs.gpu, costs.node)
    imbalance, excess = _price(served.load, balance, squares)
    cost += served.cost.sum() + imbalance
    state = np.empty(1, np.uint64)
    state[0] = np.uint64(steps.seed)
    flips = np.zeros((numbering.gpu.shape[0], numbering.leaders.shape[0]), np.uint64)
    kept_squares = np.empty_like(squares)
    even = np.empty(experts, np.int64)
    for e in range(experts):
        even[e] = sample.load[e] * (sample.start[e + 1] - sample.start[e])
    best = slot_expert.copy()
    best_cost = cost
    best_excess = excess
    proposed = 0
    tried = 0
    accepted = 0
    for stage in range(steps.temperatures.shape[0]):
        temperature = steps.temperatures[stage]
        for _ in range(steps.per_stage):
            proposed += 1
            s = next_random(state) % slots
            a = slot_expert[s]
            g = s // slots_per_gpu
            limit = (steps.neg_log[next_random(state) & 1023] * temperature) >> 20
            replace = places.replicas[a] > 1 and (next_random(state) & 1) == 0
            h = -1
            r = -1
            if replace:
                b = np.int32(next_random(state) % experts)
                if places.holds[b, g] > 0:
                    continue
            else:
                r = next_random(state) % slots
                b = slot_expert[r]
                h = r // slots_per_gpu
                if g == h or a == b or places.holds[a, h] > 0 or places.holds[b, g] > 0:
                    continue
            moved = moves.home[a, g] - np.int64(moves.home[b, g])
            new_g = new_here[g] + moved
            new_h = np.int64(0)
            if not replace:
                new_h = new_here[h] + moves.home[b, h] - np.int64(moves.home[a, h])
                moved += moves.home[b, h] - np.int64(moves.home[a, h])
                if new_h > moves.most and new_h > new_here[h]:
                    continue
            if new_g > moves.most and new_g > new_here[g]:
                continue
            if moves.unit > 0:
                safe_a = _survives(places, moves.unit, a)
                safe_b = _survives(places, moves.unit, b)
                _exchange(places, s, r, a, b)
                lost = (safe_a and not _survives(places, moves.unit, a)) or (
                    safe_b and not _survives(places, moves.unit, b)
                )
                _exchange(places, s, r, b, a)
                if lost:
                    continue
            flip_gpus(numbering, flips, g, h)
            change = costs.move * moved
            change += _spread(sample, places, costs, a) + _spread(sample, places, costs, b)
            kept_squares[:] = squares
            _change_places(places, balance, gpu_profile, squares, s, r, a, b)
            change -= _spread(sample, places, costs, a) + _spread(sample, places, costs, b)
            # What takes load off a GPU over the cap may cost anything.
            relieves = served.load[g] >> LOAD_UNIT > balance.cap
            if h >= 0:
                relieves = relieves or served.load[h] >> LOAD_UNIT > balance.cap
            # Even shares foretell what balance is gained, which traffic may be spent on.
            _even_load(places, served, even, a, b, g, h)
            gained = min(_price(served.tried_load, balance, squares)[0] - imbalance, 0)
            count = 0
            taken = relieves
            middle_a = sample.start[a] + (sample.start[a + 1] - sample.start[a]) // PARTS
            middle_b = sample.start[b] + (sample.start[b + 1] - sample.start[b]) // PARTS
            part = collect(sample, served, flips, a, b, sample.start[a], middle_a, False, 0)
            part = collect(sample, served, flips, b, a, sample.start[b], middle_b, True, part)
            found = serve(served, numbering, costs.gpu, costs.node, 0, part)
            margin = (costs.gpu + costs.node) * np.int64(np.sqrt(part)) * PARTS // 2
            if relieves or PARTS * found + change + gained <= limit + margin:
                count = collect(sample, served, flips, a, b, middle_a, sample.start[a + 1], False, part)
                count = collect(sample, served, flips, b, a, middle_b, sample.start[b + 1], True, count)
                change += found + serve(served, numbering, costs.gpu, costs.node, part, count)
                taken = relieves or change + gained <= limit
            if taken:
                tried += 1
                try_load(sample, served, numbering, count)
                new_imbalance, new_excess = _price(served.tried_load, balance, squares)
                change += new_imbalance - imbalance
                taken = new_excess < excess or (new_excess == excess and change <= limit)
            if not taken:
                _change_places(places, balance, gpu_profile, squares, s, r, b, a)
                squares[:] = kept_squares
                continue
            accepted += 1
            cost += change
            excess = new_excess
            imbalance = new_imbalance
            new_here[g] = new_g
            if not replace:
                new_here[h] = new_h
            keep(served, count)
            if excess < best_excess or (excess == best_excess and cost < best_cost):
                best_cost = cost
                best_excess = excess
                best[:] = slot_expert
    slot_expert[:] = best
    return proposed, tried, accepted
