"""plan_layer(): the search from EPLB's placement, the judgement, the fallback."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.budget import SearchBudget
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.earlier_windows import earlier_of
from sglang_eplb_affinity.planner.even_primaries import lost_evenness, with_even_primaries
from sglang_eplb_affinity.planner.judge import Judgement, judge, worth_moving
from sglang_eplb_affinity.planner.layer_problem import LayerProblem, problem_of
from sglang_eplb_affinity.planner.layer_search import search_layer, thin
from sglang_eplb_affinity.planner.layout import align, keep_slots, without_duplicates
from sglang_eplb_affinity.planner.pseudo_tokens import draw_tokens
from sglang_eplb_affinity.planner.starts import copied_start
from sglang_eplb_affinity.planner.survival import survives_better, with_survivors

NO_TRAFFIC = "no traffic"
NO_AFFINITY = "no token sample or co-activation"
NOT_BETTER = "search not better"
MOVE_CAP = "duplicates in the current map need more moves than allowed"
IN_USE_BETTER = "the current map is better"
LITTLE_GAIN = "the current map is as good, or nearly"
PSEUDO_TOKENS = 4096
ATTEMPTS = 3
GROUPED_HOT_SHARE = 0.1  # hotter, the search would scatter the groups and find no way back
GROUPED_GAIN = 0.02  # for less, the evener load of the global placement is worth more
WARM_HOT_SHARE = 0.3


@dataclass(frozen=True)
class LayerPlan:
    """One layer's slots int32 [slots], why it fell back ("" if not), and the judgements of the three maps.

    ``load_cap``: max/mean that a plan may load a GPU.
    """

    slots: np.ndarray
    fallback: str
    eplb: Judgement | None = None
    planned: Judgement | None = None
    current: Judgement | None = None
    load_cap: float = 0.0


def plan_layer(
    window: RoutingWindow, layer: int, topology: Topology, config: PlannerConfig, budget: SearchBudget,
    eplb: np.ndarray, current: np.ndarray | None, grouped: np.ndarray | None,
) -> LayerPlan:  # fmt: skip
    """Plan one layer of ``window``; arguments as of :func:`planner.plan`.

    ``eplb``, ``grouped``: EPLB's global placement and its hierarchical one by expert groups (None: does not apply);
    ``current``: the map in use; all int32 [slots].
    """
    counts = window.counts[layer]
    slots_per_gpu = len(eplb) // topology.num_gpus
    if not counts.any():
        trivial = np.arange(len(eplb), dtype=np.int32) % len(counts)
        return LayerPlan(trivial if current is None else current, NO_TRAFFIC)
    tokens = _layer_tokens(window, layer, budget.annealing.tokens, config.seed)

    earlier = earlier_of(window, layer, len(eplb), config)

    def judged_of(row: np.ndarray) -> Judgement:
        return judge(row, counts, tokens, topology, config, earlier)

    def in_place(row: np.ndarray) -> tuple[np.ndarray, Judgement]:
        """``row`` with GPUs and nodes numbered as in the current map, and its judgement."""
        if current is not None:
            row = np.asarray(align(row, current, slots_per_gpu, topology.gpus_per_node))
        return row, judged_of(row)

    scattered = None  # EPLB's global placement, where its hierarchical one dispatches for less and takes its part
    by_experts = eplb
    eplb, by_eplb = in_place(by_experts)
    if grouped is not None:
        grouped, by_groups = in_place(grouped)
        if by_groups.cost < by_eplb.cost * (1 - GROUPED_GAIN):
            eplb, by_eplb, scattered = grouped, by_groups, by_experts
    in_use = None if current is None else judged_of(current)
    # What to keep if the search fails: an incremental plan may not fall back to EPLB's map, which moves everything.
    kept, by_kept = eplb, by_eplb
    if current is not None and in_use is not None and config.keeps_current:
        kept, by_kept = current, in_use
    limit = by_eplb.load * (1 + config.max_load_increase)

    def result(slots: np.ndarray, fallback: str, judged: Judgement) -> LayerPlan:
        return LayerPlan(slots, fallback, by_eplb, judged, in_use, limit)

    def even(row: np.ndarray) -> np.ndarray:
        """``row`` as ``even_primaries`` asks; the cheapest way within the load cap, where there is one."""
        if not config.even_primaries:
            return row

        def rank(changed: np.ndarray) -> tuple[float, ...]:
            judged = judged_of(changed)
            lost = survives_better(row, changed, counts, topology, config.survive)
            return float(lost), max(judged.load - limit, 0.0), judged.objective

        return with_even_primaries(row, counts, tokens, topology, rank)

    def unless_in_use_is_better(slots: np.ndarray, fallback: str, judged: Judgement) -> LayerPlan:
        stays = config.survive == "none"  # what is in force may not survive, and may not be even
        if config.even_primaries and current is not None:
            stays = stays and not lost_evenness(slots, current, len(counts), topology)
        if stays and in_use is not None and in_use.objective <= judged.objective and in_use.load <= judged.load:
            assert current is not None
            return result(current, IN_USE_BETTER, in_use)
        return result(slots, fallback, judged)

    if kept is eplb:
        parted = with_survivors(without_duplicates(eplb, counts, topology), counts, topology, config.survive)
        by_parted = judged_of(parted)
        if config.survive != "none" or (by_parted.cost <= by_eplb.cost and by_parted.load <= limit):
            kept, by_kept = parted, by_parted
        if config.even_primaries:
            kept = even(kept)
            by_kept = judged_of(kept)
    if not len(tokens):
        return unless_in_use_is_better(kept, NO_AFFINITY, by_kept)

    problem = problem_of(counts, tokens, eplb, current, topology, config, budget, layer, earlier.shares)
    # The search knows each replica's share from coins on its own sample, the judgement from the rule's hash.
    tolerance = 0.02 if len(eplb) > len(counts) else 1e-9
    mean = counts.sum() / topology.num_gpus
    limit = max(problem.load_cap / mean + tolerance, by_eplb.load)
    cap = max(problem.load_cap / mean + tolerance, by_kept.load)
    highest = max(by_eplb.load_p95, by_kept.load_p95)
    p95_cap = np.inf if config.p95_allowance is None else highest * (1 + config.p95_allowance)

    def search(problem: LayerProblem, attempts: int) -> tuple[np.ndarray, Judgement] | str:
        """What the search found and its judgement, or why that is not to be used."""
        for attempt in range(attempts):
            found = search_layer(problem, topology, config, budget)
            if not config.keeps_current:  # what only moves slots may have put both replicas on one node
                found = with_survivors(found, counts, topology, config.survive)
            if current is not None:
                settled = _settle(even(found), current, problem, topology, config)
                if settled is None and config.even_primaries:
                    settled = _settle(found, current, problem, topology, config)  # fewer moves
                if settled is None:
                    return MOVE_CAP
                found = settled
            else:
                found = even(found)
            judged = judged_of(found)
            lighter = judged.load < by_kept.load - 0.005
            over = max(judged.load - cap, judged.load_p95 - p95_cap)
            if over <= 0 and (judged.cost < by_kept.cost or lighter):
                return found, judged
            if over <= 0 or (len(eplb) == len(counts) and judged.load_p95 <= p95_cap):
                break
            # Loaded more by the rule than the search thought: aim lower by the difference, from another seed.
            lower = int(problem.load_cap - over * mean)
            problem = replace(problem, load_cap=lower, seed=problem.seed + ((attempt + 1) << 40))
        return NOT_BETTER

    if config.warm_start and current is not None and in_use is not None and in_use.cost < by_eplb.cost:
        warm = replace(problem, start=current, hot_share=WARM_HOT_SHARE, adapts_replicas=True)
        refined = search(warm, ATTEMPTS + 1 if config.keeps_current else 1)
        if not isinstance(refined, str):
            return unless_in_use_is_better(refined[0], "", refined[1])
        if config.keeps_current:
            return result(kept, refined, by_kept)
    if scattered is None or config.keeps_current:
        outcomes = [search(problem, ATTEMPTS)]
    else:
        outcomes = [search(replace(problem, hot_share=GROUPED_HOT_SHARE), ATTEMPTS)]
        outcomes.append(search(replace(problem, start=scattered), ATTEMPTS))
    if budget.replicas and not config.keeps_current:
        copied = copied_start(problem, topology, config, budget)
        if copied is not None:
            outcomes.append(search(copied, ATTEMPTS))
    usable = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    slots, judged, reason = kept, by_kept, str(outcomes[0])
    if usable:
        slots, judged = min(usable, key=lambda outcome: outcome[1].objective)
        reason = ""
    return unless_in_use_is_better(slots, reason, judged)


def _settle(
    found: np.ndarray, current: np.ndarray, problem: LayerProblem, topology: Topology, config: PlannerConfig
) -> np.ndarray | None:
    """``found`` in the slots where it moves fewest experts; None if an incremental plan exceeds its cap."""
    slots_per_gpu = len(found) // topology.num_gpus
    if not config.keeps_current:
        return np.asarray(align(found, current, slots_per_gpu, topology.gpus_per_node))
    found = _keep_slots(found, current, slots_per_gpu)
    new = problem.home[found, np.arange(len(found)) // slots_per_gpu] == 0
    return None if new.reshape(-1, slots_per_gpu).sum(1).max() > problem.max_moves else found


def _keep_slots(found: np.ndarray, current: np.ndarray, slots_per_gpu: int) -> np.ndarray:
    out = np.empty_like(found)
    for start in range(0, len(found), slots_per_gpu):
        stop = start + slots_per_gpu
        keep_slots(found[start:stop], current[start:stop], out[start:stop])
    return out


def _layer_tokens(window: RoutingWindow, layer: int, limit: int, seed: int) -> np.ndarray:
    """int16 [T, k]: the layer's sampled sets, evenly thinned to ``limit``; drawn from co-activation if none."""
    if window.tokens is not None and window.tokens.size:
        tokens = window.tokens[layer]
        tokens = thin(tokens[(tokens >= 0).any(1)], limit)
        if len(tokens):
            return np.ascontiguousarray(tokens, dtype=np.int16)
    if window.coactivation is not None and window.coactivation[layer].any():
        counts, pairs = window.counts[layer], window.coactivation[layer]
        k = int(min(max(round(1 + pairs.sum() / counts.sum()), 2), np.count_nonzero(counts)))
        return np.asarray(draw_tokens(counts, pairs, k, min(limit, PSEUDO_TOKENS), (seed << 20) + layer))
    return np.empty((0, 1), np.int16)


def unless_little_gain(
    result: LayerPlan, current: np.ndarray | None, counts: np.ndarray, topology: Topology, config: PlannerConfig
) -> LayerPlan:
    """``result``, or the map in use where that gains less than ``PlannerConfig.minimum_gain`` asks for.

    Replicas that are missing for the loss of a rank or node, or for even primaries, are made whatever they gain.
    """
    if current is None or config.minimum_gain is None or result.planned is None or result.current is None:
        return result
    if worth_moving(result.current, result.planned, result.load_cap, config.minimum_gain):
        return result
    if survives_better(result.slots, current, counts, topology, config.survive):
        return result
    if config.even_primaries and lost_evenness(result.slots, current, len(counts), topology):
        return result
    return replace(result, slots=current, fallback=LITTLE_GAIN, planned=result.current)
