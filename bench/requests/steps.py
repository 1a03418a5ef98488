"""Simulated time, copies and load of steps made of the requests in flight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.requests.dealing import InFlight
from bench.requests.workload import Requests
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.simulate.scenario import Phase
from sglang_eplb_affinity.simulate.system import DeepEPMode
from sglang_eplb_affinity.simulate.timing import LayerTime, TimeModel
from sglang_eplb_affinity.simulate.traffic import (
    LATENCY_LOCAL,
    LATENCY_RDMA_OUT,
    NORMAL_LOCAL,
    NORMAL_RDMA_OUT,
    NORMAL_RECEIVED,
    BatchTraffic,
    batch_traffic,
)

# Consecutive tokens of each prompt in a prefill step; each then stands for several (`scale`).
PREFILL_RUN = 8


@dataclass(frozen=True)
class StepFigures:
    """Means over steps and layers. Copies per token: of tokens in normal mode, of (token, expert) in low latency.

    ``level_step_ms``: what the step would take if every link and GPU carried as much as the mean one does: the most
    that better balance could add to what fewer copies bring.
    """

    remote_gpu_copies: float
    remote_node_copies: float
    load_max_over_mean: float
    dispatch_us: float
    experts_us: float
    combine_us: float
    rest_us: float
    step_ms: float
    level_step_ms: float


def tokens_of_step(requests: Requests, step: InFlight, phase: Phase) -> tuple[np.ndarray, np.ndarray]:
    """(int [tokens] rows of the trace, int32 [tokens] their ranks): one token of each answer, or a run of a prompt."""
    if phase == "decode":
        rows = [requests.rows[r][requests.cuts[r] + age] for r, age in zip(step.request, step.age, strict=True)]
        return np.array(rows), step.rank.astype(np.int32)
    starts = [age % max(1, requests.cuts[r] - PREFILL_RUN + 1) for r, age in zip(step.request, step.age, strict=True)]
    runs = [requests.rows[r][s : s + PREFILL_RUN] for r, s in zip(step.request, starts, strict=True)]
    return np.concatenate(runs), np.repeat(step.rank, PREFILL_RUN).astype(np.int32)


def measure_steps(
    requests: Requests, steps: Sequence[InFlight], expert_map: ExpertMap, model: TimeModel, phase: Phase,
    mode: DeepEPMode, rule: DispatchRule, tokens_per_gpu: int,
) -> StepFigures:  # fmt: skip
    """All ``steps`` through one map."""
    topology, top_k = model.system.topology, requests.trace.top_k
    prefill = phase == "prefill"
    figures: list[tuple[float, ...]] = []
    times: list[tuple[float, float]] = []
    for step in steps:
        rows, source = tokens_of_step(requests, step, phase)
        scale = tokens_per_gpu * topology.num_gpus / len(rows)
        busiest = float(np.bincount(source, minlength=topology.num_gpus).max()) * scale
        layers: list[LayerTime] = []
        level: list[LayerTime] = []
        for layer in range(requests.trace.num_layers):
            traffic = batch_traffic(requests.trace.topk_ids[rows, layer], source, expert_map, layer, topology, rule)
            layers.append(model.layer(traffic, scale, mode, prefill, busiest))
            level.append(_level_layer(model, traffic, scale, mode, prefill, tokens_per_gpu))
            sent = traffic.counters.sum(1) / len(rows)
            if mode == "normal":
                copies = (sent[NORMAL_RECEIVED] - sent[NORMAL_LOCAL], sent[NORMAL_RDMA_OUT])
            else:
                copies = (top_k - sent[LATENCY_LOCAL], sent[LATENCY_RDMA_OUT])
            stages = (layers[-1].dispatch_us, layers[-1].experts_us, layers[-1].combine_us, layers[-1].rest_us)
            figures.append((*copies, traffic.load_max_over_mean, *stages))
        times.append((
            model.step_ms(layers, None, prefill, busiest), model.step_ms(level, None, prefill, tokens_per_gpu)
        ))  # fmt: skip
    return StepFigures(*map(float, np.mean(figures, 0)), *map(float, np.mean(times, 0)))


def _level_layer(
    model: TimeModel, traffic: BatchTraffic, scale: float, mode: DeepEPMode, prefill: bool, tokens: float
) -> LayerTime:
    """Links carry the mean of all, and experts take the mean time of all GPUs."""
    gpus = traffic.counters.shape[1]
    counters = np.repeat(traffic.counters.mean(1, keepdims=True), gpus, 1)
    by_gpu = traffic.slot_load.reshape(gpus, -1) * scale
    one = [np.where(np.arange(gpus)[:, None] == gpu, by_gpu, 0).ravel() for gpu in range(gpus)]
    alone = [model.experts(slot_load, mode, prefill)[0] for slot_load in one]
    level = BatchTraffic(counters, traffic.slot_load, traffic.num_tokens)
    return dataclasses.replace(model.layer(level, scale, mode, prefill, tokens), experts_us=float(np.mean(alone)))
