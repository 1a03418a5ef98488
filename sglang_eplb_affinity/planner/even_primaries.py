"""Maps that allow every GPU as many primary slots as any other (dispatch/primaries.py).

A map allows it unless some set of GPUs holds all replicas of more experts than its share (Hall's theorem). Every map of
every shape can be mended, by as many changed slots as there are experts over the share, and by no fewer: let S be the
GPUs that chains of moves from an overfull GPU reach. All replicas of S's experts are in S, so some GPU outside of S
has fewer primaries than its share, and hence a slot that is not primary. Given one of S's experts, that slot takes the
end of a chain; what it held keeps its primary slot. One slot moves at most one expert, so fewer do not do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from sglang_eplb_affinity.dispatch.primaries import even_choice, over_share, primaries_of
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.layout import keep_slots

JUDGED = 6  # candidates of a step that are judged on the sample, of each order


def with_even_primaries(
    row: np.ndarray, counts: np.ndarray, tokens: np.ndarray, topology: Topology,
    rank: Callable[[np.ndarray], tuple[float, ...]],
) -> np.ndarray:  # fmt: skip
    """``row`` int32 [slots] with as few slots changed that no GPU has more primaries than its share.

    counts int64 [experts]; tokens int16 [T, k], for what moves where. Each step swaps a slot of an overfull set of GPUs
    with one that is not primary, or gives that one to it, whichever of the likeliest has the lowest ``rank``.
    """
    out = row.copy()
    pairs: np.ndarray | None = None
    while True:
        primary = _primaries(out, len(counts), topology)
        if not over_share(primary, topology, len(out)):
            return out
        if pairs is None:
            pairs = _pairs(tokens, len(counts))
        out = min(_likeliest(out, primary, counts, pairs, topology), key=rank)


def lost_evenness(planned: np.ndarray, current: np.ndarray, num_experts: int, topology: Topology) -> bool:
    """Whether ``current`` has more experts over a GPU's share of primaries than ``planned``, int32 [slots] both."""
    over = [over_share(_primaries(row, num_experts, topology), topology, len(row)) for row in (planned, current)]
    return over[0] < over[1]


def _primaries(row: np.ndarray, num_experts: int, topology: Topology) -> np.ndarray:
    table = ExpertMap(row[None], num_experts).logical_to_all_physical()
    return np.asarray(primaries_of(table, topology, len(row))[0])


def _pairs(tokens: np.ndarray, num_experts: int) -> np.ndarray:
    """float32 [experts, experts]: tokens of the sample that chose both."""
    chose = np.zeros((len(tokens), num_experts), np.float32)
    at, column = np.nonzero(tokens >= 0)
    chose[at, tokens[at, column]] = 1
    return chose.T @ chose


def _likeliest(
    row: np.ndarray, primary: np.ndarray, counts: np.ndarray, pairs: np.ndarray, topology: Topology
) -> Iterator[np.ndarray]:
    """Rows after one step: those that shift the least load, and those whose experts fire most with their new GPU's."""
    experts, per_gpu = len(counts), len(row) // topology.num_gpus
    gpu_of = np.arange(len(row)) // per_gpu
    holds = np.zeros((experts, topology.num_gpus), bool)
    holds[row, gpu_of] = True
    has = np.bincount(primary // per_gpu, minlength=topology.num_gpus)
    share = -(-experts // topology.num_gpus)
    closed = has > share
    while True:  # the GPUs that chains of moves reach
        reached = closed | holds[closed[primary // per_gpu]].any(0)
        if (reached == closed).all():
            break
        closed = reached
    spare = (has < share) & ~closed
    free = np.flatnonzero(spare[gpu_of] & (primary[row] != np.arange(len(row))))
    inside = np.flatnonzero(closed[gpu_of] & closed[primary[row] // per_gpu])
    load = counts / np.bincount(row, minlength=experts)
    near = pairs @ holds.astype(np.float32)  # [experts, gpus]
    g, h = gpu_of[inside][:, None], gpu_of[free][None]
    e, f = row[inside][:, None], row[free][None]
    gained = near[e, h] - near[f, h]
    after = load * np.bincount(row, minlength=experts)
    less = after / np.maximum(np.bincount(row, minlength=experts) - 1, 1)
    more = after / (np.bincount(row, minlength=experts) + 1)
    swapped = np.where(holds[f, g], np.inf, np.abs(load[e] - load[f]))
    taken = np.abs(more[e] - load[f]) + np.abs(less[f] - load[f]) + np.abs(load[e] - more[e])
    seen: set[tuple[bool, int, int]] = set()
    scale = max(float(np.abs(gained).max(initial=0)), 1e-9)
    mean = counts.sum() / topology.num_gpus
    for swaps, shift, worth in (
        (True, swapped, gained + near[f, g] - near[e, g]), (False, np.broadcast_to(taken, swapped.shape), gained)
    ):  # fmt: skip
        for order in (shift, shift / mean - 0.1 * worth / scale):
            for flat in np.argsort(order, axis=None, kind="stable")[:JUDGED].tolist():
                i, j = divmod(flat, len(free))
                if not np.isfinite(shift[i, j]) or (swaps, i, j) in seen:
                    continue
                seen.add((swaps, i, j))
                new = row.copy()
                new[free[j]] = row[inside[i]]
                if swaps:
                    new[inside[i]] = row[free[j]]
                yield new


def primaries_first(
    row: np.ndarray, counts: np.ndarray, topology: Topology, current: np.ndarray | None = None, even_load: bool = True
) -> np.ndarray:
    """``row`` int32 [slots] with each GPU's primaries in its first slots, where an even choice exists: those that load
    the busiest GPU least, as far as exchanges among two and three GPUs find, or without ``even_load`` any. counts int64
    [experts].

    Experts keep the slot that they have in ``current`` (None: in ``row``) where that may be, and primaries the GPU.
    """
    experts, gpus = len(counts), topology.num_gpus
    primary = _primaries(row, experts, topology)
    if experts % gpus or over_share(primary, topology, len(row)):
        return row
    table = ExpertMap(row[None], experts).logical_to_all_physical()[0]
    per_gpu, share = len(row) // gpus, experts // gpus
    if current is not None:
        primary = _near(table, _primaries(current, experts, topology) // per_gpu, topology, per_gpu)
    primary = primary.astype(np.int64)
    if even_load:
        primary = _even_load(table, primary, counts.astype(np.int64), gpus, per_gpu)
    leads = np.zeros(len(row), bool)
    leads[primary] = True
    out, before = np.empty_like(row), row if current is None else current.astype(row.dtype)
    for start in range(0, len(row), per_gpu):
        own, first = row[start : start + per_gpu], leads[start : start + per_gpu]
        for part, begin, end in ((own[first], 0, share), (own[~first], share, per_gpu)):
            keep_slots(part, before[start + begin : start + end], out[start + begin : start + end])
    return out


def _near(table: np.ndarray, gpu: np.ndarray, topology: Topology, per_gpu: int) -> np.ndarray:
    """int32 [experts]: an even choice of primary slots, of which many are where the experts' primaries were, ``gpu``.

    table int32 [experts, max_replicas].
    """
    there = (table >= 0) & (table // per_gpu == gpu[:, None])
    chosen = there.argmax(1)  # an expert that is gone from there: its first slot
    even_choice(table, (table >= 0).sum(1).astype(np.int32), chosen, topology.num_gpus, per_gpu)
    return np.asarray(np.take_along_axis(table, chosen[:, None], axis=1)[:, 0])


@kernel
def _even_load(table, primary, counts, num_gpus, per_gpu):  # type: ignore[no-untyped-def]
    """int64 [experts]: primary slots, as many on each GPU as ``primary`` has, with a lower sum of squared GPU loads.

    table int32 [experts, max_replicas]; primary, counts int64 [experts]. Each step is the best exchange of the busiest
    GPU with another, or where there is none with two, until there is none.
    """
    experts, columns = table.shape
    load = np.zeros(num_gpus, np.float64)
    slot_on = np.full((experts, num_gpus), -1, np.int64)
    for e in range(experts):
        load[primary[e] // per_gpu] += counts[e]
        for i in range(columns):
            if table[e, i] >= 0:
                slot_on[e, table[e, i] // per_gpu] = table[e, i]
    while True:
        g = int(np.argmax(load))
        best = -1e-9 * (1.0 + load[g] * load[g])  # what rounding could feign is none
        first, second, third = -1, -1, -1
        for ways in (2, 3):
            for a in range(experts):
                if primary[a] // per_gpu != g:
                    continue
                for b in range(experts):
                    h = primary[b] // per_gpu
                    if h == g or slot_on[a, h] < 0:
                        continue
                    at_g, at_h = load[g] - counts[a], load[h] + counts[a] - counts[b]
                    if ways == 2:
                        change = (at_g + counts[b]) ** 2 + at_h**2 - load[g] ** 2 - load[h] ** 2
                        if slot_on[b, g] >= 0 and change < best:
                            best, first, second = change, a, b
                        continue
                    for c in range(experts):
                        k = primary[c] // per_gpu
                        if k in (g, h) or slot_on[b, k] < 0 or slot_on[c, g] < 0:
                            continue
                        change = (at_g + counts[c]) ** 2 + at_h**2 + (load[k] + counts[b] - counts[c]) ** 2
                        change -= load[g] ** 2 + load[h] ** 2 + load[k] ** 2
                        if change < best:
                            best, first, second, third = change, a, b, c
            if first >= 0:
                break
        if first < 0:
            return primary
        h, last = primary[second] // per_gpu, second
        load[g] -= counts[first]
        load[h] += counts[first] - counts[second]
        if third >= 0:
            k, last = primary[third] // per_gpu, third
            load[k] += counts[second] - counts[third]
            primary[second] = slot_on[second, k]
        load[g] += counts[last]
        primary[first] = slot_on[first, h]
        primary[last] = slot_on[last, g]
