"""plan(): EPLB's placement, the search from it, the judgement, the fallback; layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.dispatch import DISPATCH_RULES
from sglang_eplb_affinity.errors import InputError
from sglang_eplb_affinity.evaluate import measure_layer, moved_experts
from sglang_eplb_affinity.expert_map import ExpertMap
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.eplb import eplb_placement
from sglang_eplb_affinity.planner.imbalance import ImbalanceWeights, imbalance
from sglang_eplb_affinity.planner.layer_search import (
    COST_UNIT,
    UNLIMITED,
    Annealing,
    LayerProblem,
    SearchBudget,
    search_layer,
)
from sglang_eplb_affinity.planner.layout import align, keep_slots
from sglang_eplb_affinity.planner.pseudo_tokens import draw_tokens
from sglang_eplb_affinity.planner.report import MapQuality, Plan, PlanReport
from sglang_eplb_affinity.routing import RoutingWindow
from sglang_eplb_affinity.topology import Topology

NO_TRAFFIC = "no traffic"
NO_AFFINITY = "no token sample or co-activation"
NOT_BETTER = "search not better"
DUPLICATES = "an expert twice on a GPU, no swap to part them"
MOVE_CAP = "duplicates in the current map need more moves than allowed"
PSEUDO_TOKENS = 4096
WEIGHTS = ImbalanceWeights()
NOISE = 1.0


@dataclass(frozen=True)
class Judgement:
    """cost, gpu fan-out, node fan-out, max/mean load of one layer's map on the plan sample."""

    cost: float
    gpu_fanout: float
    node_fanout: float
    load: float


def plan(
    window: RoutingWindow,
    topology: Topology,
    num_slots: int,
    config: PlannerConfig = PlannerConfig(),  # noqa: B008 (frozen)
    current: ExpertMap | None = None,
    progress: Callable[[int], object] | None = None,
) -> Plan:
    """Place the experts of every layer so that dispatch costs least and no GPU is loaded more than EPLB would load it.

    ``num_slots``: physical experts (logical + redundant). ``current``: the map in use; the new map then moves as few
    experts as it can, and with ``config.max_moves`` at most that many to each rank and layer. ``progress`` is called
    with 1 after each layer. Equal input gives equal output on every rank. Layers without traffic keep the current map
    (EPLB's without one). Raises InputError for sizes that do not fit and for a window without tokens.
    """
    began = time.perf_counter()
    _check(window, topology, num_slots, config, current)
    eplb = eplb_placement(window.counts, topology, num_slots)
    layers = window.num_layers

    def one(layer: int) -> tuple[np.ndarray, str, Judgement | None, Judgement | None, Judgement | None]:
        result = _plan_layer(window, layer, topology, config, eplb, current)
        if progress is not None:
            progress(1)
        return result

    threads = min(config.resolved_threads(), layers)
    if threads > 1:
        with ThreadPoolExecutor(threads, "eplb-affinity-plan") as pool:
            results = list(pool.map(one, range(layers)))
    else:
        results = [one(layer) for layer in range(layers)]
    expert_map = ExpertMap(np.stack([result[0] for result in results]), window.num_experts)
    report = PlanReport(
        eplb=_quality([result[2] for result in results]),
        planned=_quality([result[3] for result in results]),
        current=None if current is None else _quality([result[4] for result in results]),
        fallback=tuple(result[1] for result in results),
        moved_experts=None if current is None else moved_experts(current, expert_map, topology),
        seconds=time.perf_counter() - began,
    )
    return Plan(expert_map, report)


def _check(
    window: RoutingWindow, topology: Topology, num_slots: int, config: PlannerConfig, current: ExpertMap | None
) -> None:
    topology.slots_per_gpu(num_slots)
    if num_slots < window.num_experts:
        raise InputError(
            f"{num_slots} physical experts cannot hold {window.num_experts} logical experts; each needs a slot"
        )
    if window.counts.min(initial=0) < 0:
        raise InputError("routing window: counts are negative; expected tokens per expert")
    if not window.counts.any():
        raise InputError("routing window: empty, no tokens were recorded; record some traffic before planning")
    if config.max_moves is not None and current is None:
        raise InputError(f"planner: max_moves={config.max_moves} needs the current map")
    if current is not None:
        shape = (window.num_layers, num_slots)
        if current.physical_to_logical.shape != shape:
            raise InputError(
                f"current map: has [layers, slots] {current.physical_to_logical.shape}, but must have {shape}"
            )
        if current.num_experts != window.num_experts:
            raise InputError(
                f"current map: holds {current.num_experts} experts, but the routing window has {window.num_experts}"
            )


def _plan_layer(
    window: RoutingWindow,
    layer: int,
    topology: Topology,
    config: PlannerConfig,
    eplb_map: ExpertMap,
    current_map: ExpertMap | None,
) -> tuple[np.ndarray, str, Judgement | None, Judgement | None, Judgement | None]:
    """(slots, fallback reason, EPLB judged, planned judged, current judged)."""
    counts = window.counts[layer]
    current = None if current_map is None else current_map.physical_to_logical[layer]
    eplb = eplb_map.physical_to_logical[layer]
    kept = eplb if current is None else current
    if not counts.any():
        return kept, NO_TRAFFIC, None, None, None
    slots_per_gpu = len(eplb) // topology.num_gpus
    aligned = eplb if current is None else align(eplb, current, slots_per_gpu, topology.gpus_per_node)
    budget = budget_for(window.num_experts, topology, len(eplb), config)
    tokens = _layer_tokens(window, layer, budget.tokens, config.seed)

    def judge(row: np.ndarray) -> Judgement:
        return _judge(row, counts, tokens, topology, config)

    before = None if current is None else judge(current)
    baseline = judge(aligned)
    limited = current is not None and config.max_moves is not None
    if not len(tokens):
        if limited:
            return kept, NO_AFFINITY, baseline, before, before
        return aligned, NO_AFFINITY, baseline, baseline, before

    replicas = np.bincount(eplb, minlength=len(counts))
    even = (counts / replicas)[eplb].reshape(topology.num_gpus, -1).sum(1).max()
    balance = imbalance(tokens, counts, int(even), topology.num_gpus, COST_UNIT, WEIGHTS)
    cap = int(even * (1 + config.max_load_increase) + NOISE * balance.noise * counts.sum() / topology.num_gpus)
    home = np.ones((len(counts), topology.num_gpus), np.uint8)
    if limited:
        assert current is not None
        home[:] = 0
        home[current, np.arange(len(current)) // slots_per_gpu] = 1
    max_moves = UNLIMITED
    start = aligned
    if current is not None and config.max_moves is not None:
        max_moves, start = config.max_moves, current
    problem = LayerProblem(
        counts, tokens, start.copy(), cap, balance, home, config.move_cost if limited else 0, max_moves,
        (config.seed << 20) + layer + 1,
    )  # fmt: skip
    found = search_layer(problem, topology, config, budget)
    fallback, fallback_judged = (current, before) if limited else (aligned, baseline)
    assert fallback is not None and fallback_judged is not None
    if found is None:
        return fallback, DUPLICATES, baseline, fallback_judged, before
    if current is not None:
        if limited:
            found = _keep(found, current, slots_per_gpu)
            if (home[found, np.arange(len(found)) // slots_per_gpu] == 0).reshape(-1, slots_per_gpu).sum(
                1
            ).max() > max_moves:
                return fallback, MOVE_CAP, baseline, fallback_judged, before
        else:
            found = align(found, current, slots_per_gpu, topology.gpus_per_node)
    judged = judge(found)
    mean = counts.sum() / topology.num_gpus
    allowed = max(cap / mean + 0.005, fallback_judged.load)
    if judged.load <= allowed and (judged.cost < fallback_judged.cost or judged.load < fallback_judged.load - 0.005):
        return found, "", baseline, judged, before
    return fallback, NOT_BETTER, baseline, fallback_judged, before


def _keep(found: np.ndarray, current: np.ndarray, slots_per_gpu: int) -> np.ndarray:
    out = np.empty_like(found)
    for start in range(0, len(found), slots_per_gpu):
        stop = start + slots_per_gpu
        keep_slots(found[start:stop], current[start:stop], out[start:stop])
    return out


def _layer_tokens(window: RoutingWindow, layer: int, limit: int, seed: int) -> np.ndarray:
    """int16 [T, k]: the layer's sampled sets, evenly thinned to ``limit``; drawn from co-activation if none."""
    if window.tokens is not None and window.tokens.size:
        tokens = window.tokens[layer]
        used = np.flatnonzero(tokens[:, 0] >= 0)
        if len(used) > limit:
            used = used[np.arange(limit) * len(used) // limit]
        if len(used):
            return np.ascontiguousarray(tokens[used], dtype=np.int16)
    if window.coactivation is not None and window.coactivation[layer].any():
        counts, pairs = window.counts[layer], window.coactivation[layer]
        k = int(min(max(round(1 + pairs.sum() / counts.sum()), 2), np.count_nonzero(counts)))
        return draw_tokens(counts, pairs, k, min(limit, PSEUDO_TOKENS), (seed << 20) + layer)
    return np.empty((0, 1), np.int16)


def _judge(
    row: np.ndarray, counts: np.ndarray, tokens: np.ndarray, topology: Topology, config: PlannerConfig
) -> Judgement:
    """The map ``row`` int32 [slots] on the sample, under the rule the server uses."""
    experts = len(counts)
    one = ExpertMap(row[None], experts)
    replicas = one.replica_counts()[0]
    slot_load = np.zeros(len(row), np.int64)
    sums = np.zeros(5, np.int64)
    source = (np.arange(len(tokens)) % topology.num_gpus).astype(np.int32)
    measure_layer(
        tokens, source, one.logical_to_all_physical()[0], replicas, len(row) // topology.num_gpus,
        topology.gpus_per_node, topology.num_nodes, DISPATCH_RULES.index(config.dispatch), sums, slot_load,
    )  # fmt: skip
    sampled = np.bincount(row, weights=slot_load, minlength=experts)
    share = np.where(sampled[row] > 0, slot_load / np.maximum(sampled[row], 1), 1 / replicas[row])
    load = (share * counts[row]).reshape(topology.num_gpus, -1).sum(1)
    gpu, node, _, _, copies = (sums / max(len(tokens), 1)).tolist()
    normal = config.normal_share
    nodes = config.node_weight if topology.num_nodes > 1 else 0
    cost = normal * (gpu + nodes * node) + (1 - normal) * nodes * copies
    return Judgement(cost, gpu, node, float(load.max() / load.mean()))


def _quality(judgements: list[Judgement | None]) -> MapQuality:
    def column(name: str) -> np.ndarray:
        return np.array([np.nan if j is None else getattr(j, name) for j in judgements])

    return MapQuality(column("gpu_fanout"), column("node_fanout"), column("load"), column("cost"))


def budget_for(num_experts: int, topology: Topology, num_slots: int, config: PlannerConfig) -> SearchBudget:
    """How many tokens and proposals a layer gets."""
    fast = config.effort == "fast"
    swaps = Annealing(4096, 40, 1500, 0.01, 0.0005) if fast else Annealing(16384, 100, 20000, 0.01, 0.0003)
    if num_slots == num_experts:
        return SearchBudget(swaps)
    if config.dispatch != "cover" and config.objective == "normal":
        return SearchBudget(swaps)
    if fast:
        return SearchBudget(Annealing(4096, 20, 1500, 0.004, 0.0005), Annealing(2048, 20, 200, 0.002, 0.0005))
    return SearchBudget(None, Annealing(4096, 100, 2500, 0.008, 0.0003))
