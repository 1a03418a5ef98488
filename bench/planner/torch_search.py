"""The swap search as batched torch beside the numba kernel: the same cost, the same start, time to equal quality.

All layers are one batch. A step pairs the GPUs at random; for every pair and layer all swaps of an expert of one with
an expert of the other are evaluated exactly by batched matrix products, and one of them, or none, is drawn with
probability exp(-cost / temperature). Pairs share no GPU, so that their swaps add up exactly: layers x GPUs / 2 accepted
swaps a step. One node and no redundant experts: with nodes, or replicas that look at each other, the swaps of a step
would not be independent any more.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.planner.speed import dsv3_windows
from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement
from sglang_eplb_affinity.planner.budget import COST_UNIT, SearchBudget, budget_for
from sglang_eplb_affinity.planner.imbalance import SHIFT, Imbalance
from sglang_eplb_affinity.planner.layer_problem import UNLIMITED, LayerProblem
from sglang_eplb_affinity.planner.layer_search import search_layer, thin

LOAD_WEIGHT = 50.0  # copies per token that the squared relative load above LOAD_FREE costs, mean over GPUs
LOAD_FREE = 1.0


@dataclass(frozen=True)
class Problem:
    """tokens int16 [layers, T, k] of the plan sample, counts int64 [layers, experts], EPLB's map to start from."""

    tokens: np.ndarray
    counts: np.ndarray
    start: ExpertMap
    topology: Topology
    load_cap: float  # max/mean

    @staticmethod
    def of(window: RoutingWindow, topology: Topology, tokens: int) -> Problem:
        assert window.tokens is not None
        sample = np.stack([thin(layer, tokens) for layer in window.tokens])
        start = eplb_placement(window.counts, topology, window.num_experts)
        load = np.take_along_axis(window.counts, start.physical_to_logical.astype(np.int64), 1)
        per_gpu = load.reshape(len(load), topology.num_gpus, -1).sum(2)
        return Problem(sample, window.counts, start, topology, float((per_gpu.max(1) / per_gpu.mean(1)).max()) + 0.02)


def torch_search(problem: Problem, steps: int, hot: float, cold: float, seed: int = 0) -> ExpertMap:
    """``hot`` and ``cold``: first and last temperature in tokens of an average expert, as in planner/budget.py."""
    generator = torch.Generator().manual_seed(seed)
    layers, total, k = problem.tokens.shape
    gpus, experts = problem.topology.num_gpus, problem.counts.shape[1]
    slots = torch.from_numpy(problem.start.physical_to_logical.astype(np.int64)).reshape(layers, gpus, -1)
    member = torch.zeros(layers, experts, total)
    for j in range(k):
        member.scatter_(1, torch.from_numpy(problem.tokens[:, None, :, j].astype(np.int64)), 1.0)
    layer = torch.arange(layers)[:, None]
    sets = member[layer[..., None], slots]  # [layers, gpus, slots of a GPU, tokens]
    del member
    visits = sets.sum(2)
    counts = torch.from_numpy(problem.counts).double()
    weight = (counts / counts.sum(1, keepdim=True) * gpus).float()[layer[..., None], slots]
    load = weight.sum(2)
    price = LOAD_WEIGHT * total / gpus
    unit = total * k / experts
    for step in range(steps):
        temperature = unit * hot * (cold / hot) ** (step / max(steps - 1, 1))
        order = torch.randperm(gpus, generator=generator)
        g, h = order[: gpus // 2], order[gpus // 2 : gpus // 2 * 2]
        a, b, at_g, at_h = sets[:, g], sets[:, h], visits[:, g], visits[:, h]
        alone_g, alone_h = (at_g == 1).float(), (at_h == 1).float()
        change_a = torch.matmul(a, ((at_h == 0).float() - alone_g)[..., None])[..., 0]
        change_b = torch.matmul(b, ((at_g == 0).float() - alone_h)[..., None])[..., 0]
        both = torch.matmul(a * (alone_g + alone_h)[:, :, None], b.transpose(2, 3))
        shift = weight[:, g][..., None] - weight[:, h][:, :, None]
        before_g, before_h = load[:, g][..., None, None], load[:, h][..., None, None]
        after_g, after_h = before_g - shift, before_h + shift
        squares = _above(after_g) + _above(after_h) - _above(before_g) - _above(before_h)
        cost = change_a[..., None] + change_b[:, :, None] + both + price * squares
        over = _over(after_g, problem) + _over(after_h, problem)
        cost = cost.masked_fill(over > _over(before_g, problem) + _over(before_h, problem), torch.inf)
        options = torch.cat([cost.flatten(2), torch.zeros(layers, len(g), 1)], 2) / -temperature
        noise = -torch.log(torch.empty_like(options).exponential_(generator=generator))
        choice = (options + noise).argmax(2)
        where, pair = (choice < cost[0, 0].numel()).nonzero(as_tuple=True)
        i, j = choice[where, pair] // cost.shape[3], choice[where, pair] % cost.shape[3]
        _swap(sets, visits, weight, load, slots, where, g[pair], h[pair], i, j)
    return ExpertMap(slots.reshape(layers, -1).numpy().astype(np.int32), experts)


def _above(load: torch.Tensor) -> torch.Tensor:
    return (load - LOAD_FREE).clamp(min=0) ** 2


def _over(load: torch.Tensor, problem: Problem) -> torch.Tensor:
    return (load - problem.load_cap).clamp(min=0)


def _swap(sets, visits, weight, load, slots, layer, g, h, i, j):  # type: ignore[no-untyped-def]
    """Slot i of GPU g and slot j of GPU h change places; no GPU occurs twice in a layer."""
    from_g, from_h = sets[layer, g, i], sets[layer, h, j]
    visits[layer, g] += from_h - from_g
    visits[layer, h] += from_g - from_h
    shift = weight[layer, h, j] - weight[layer, g, i]
    load[layer, g] += shift
    load[layer, h] -= shift
    for table in (sets, weight, slots):
        kept = table[layer, g, i].clone()
        table[layer, g, i] = table[layer, h, j]
        table[layer, h, j] = kept


def numba_search(problem: Problem, budget: SearchBudget, threads: int) -> ExpertMap:
    """The planner's swap search with the same cost: no term for blocks of time, one node, the same cap."""
    layers, gpus = len(problem.tokens), problem.topology.num_gpus
    config = PlannerConfig(node_weight=0)

    def one(layer: int) -> np.ndarray:
        counts, tokens = problem.counts[layer], problem.tokens[layer]
        mean = counts.sum() / gpus
        scale = math.sqrt(LOAD_WEIGHT * COST_UNIT / gpus * (1 << SHIFT)) / mean
        no_blocks = np.zeros((len(counts), 1), np.int32)
        balance = Imbalance(no_blocks, int(LOAD_FREE * mean), round(scale * (1 << 20)), 0.0)
        layer_problem = LayerProblem(
            counts, tokens, problem.start.physical_to_logical[layer].astype(np.int32), int(problem.load_cap * mean),
            balance, np.ones((len(counts), gpus), np.uint8), 0, UNLIMITED, layer + 1,
        )  # fmt: skip
        found = search_layer(layer_problem, problem.topology, config, budget)
        assert found is not None
        return found

    with ThreadPoolExecutor(threads) as pool:
        return ExpertMap(np.stack(list(pool.map(one, range(layers)))), problem.counts.shape[1])


def workloads(window: RoutingWindow) -> dict[str, tuple[Problem, tuple[int, ...]]]:
    """The given window on 8 GPUs, and DeepSeek-V3's size on 32: torch runs fewer steps there, each is that slow."""
    return {
        f"{window.num_layers} x {window.num_experts} experts, 8 GPUs": (
            Problem.of(window, Topology(8), 4096),
            (25, 100),
        ),
        "58 x 256 experts, 32 GPUs (synthetic)": (Problem.of(dsv3_windows()[1], Topology(32), 2048), (10,)),
    }


def search_rows(problems: dict[str, tuple[Problem, tuple[int, ...]]], repeats: int) -> list[dict[str, Any]]:
    """For each workload (its problem and numbers of torch steps) one row per arm; arms take turns."""
    threads = PlannerConfig().resolved_threads()
    rows = []
    for name, (problem, steps) in problems.items():
        fast = budget_for(problem.counts.shape[1], problem.counts.shape[1], PlannerConfig())
        hot, cold = fast.annealing.hot, fast.annealing.cold
        arms: dict[str, Callable[[], ExpertMap]] = {"EPLB's map, the start": partial(getattr, problem, "start")}
        for share in (8, 1):
            annealing = replace(fast.annealing, steps_per_stage=fast.annealing.steps_per_stage // share)
            budget = replace(fast, annealing=annealing)
            arm = "numba, fast effort" if share == 1 else f"numba, 1/{share} of the proposals"
            arms[arm] = partial(numba_search, problem, budget, threads)
        for count in steps:
            arms[f"torch, {count} steps"] = partial(torch_search, problem, count, hot, cold)
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        found: dict[str, ExpertMap] = {}
        for _ in range(repeats):
            for arm, run in arms.items():
                began = time.perf_counter()
                found[arm] = run()
                times[arm].append(time.perf_counter() - began)
        for arm, taken in times.items():
            sample = measure(problem.tokens, found[arm], problem.topology, "dynamic", None)
            load = np.take_along_axis(problem.counts, found[arm].physical_to_logical.astype(np.int64), 1)
            per_gpu = load.reshape(len(load), problem.topology.num_gpus, -1).sum(2)
            relative = per_gpu / per_gpu.mean(1, keepdims=True)
            penalty = float((np.maximum(relative - LOAD_FREE, 0) ** 2).mean() * LOAD_WEIGHT)
            fanout = float(sample.gpu_fanout.mean())
            rows.append({
                "workload": name, "arm": arm, "repeats": repeats, "seconds": statistics.median(taken),
                "seconds_min": min(taken), "seconds_max": max(taken), "cost": fanout + penalty, "gpu_fanout": fanout,
                "load_max_over_mean": float(relative.max(1).mean()),
            })  # fmt: skip
    return rows
