"""Plan with each algorithm, run batches of held-out tokens through every map, resample, and compare."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sglang_eplb_affinity.dispatch.default_rule import affinity_rule
from sglang_eplb_affinity.dispatch.rules import LARGE_PASS_RULE, DispatchRule
from sglang_eplb_affinity.dispatch.small_passes import most_tokens
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan
from sglang_eplb_affinity.planner.config import Effort
from sglang_eplb_affinity.simulate.source import RoutingSource
from sglang_eplb_affinity.simulate.system import DeepEPMode, System
from sglang_eplb_affinity.simulate.timing import LayerTime, TimeModel
from sglang_eplb_affinity.simulate.traffic import batch_traffic

Algorithm = Literal["none", "eplb", "affinity"]
Phase = Literal["prefill", "decode"]
ALGORITHMS: tuple[Algorithm, ...] = ("none", "eplb", "affinity")
PHASES: tuple[Phase, ...] = ("prefill", "decode")
# 90 % of resampled batches lie in the interval.
LOWER, UPPER = 5, 95


@dataclass(frozen=True)
class Arm:
    """An algorithm with the rule by which the server picks replicas. ``further_slots``: of each GPU, of ``primary``."""

    algorithm: Algorithm
    rule: DispatchRule
    effort: Effort = "fast"
    further_slots: int = 0


def default_arm(
    algorithm: Algorithm, system: System, phase: Phase, rule: DispatchRule | None = None, further_slots: int = 0
) -> Arm:
    """SGLang's ``static`` for all but affinity, which takes what a server of this phase would. ``rule`` replaces it;
    ``further_slots`` are of ``primary``."""
    if algorithm != "affinity":
        return Arm(algorithm, "static")
    chosen = rule or affinity_rule(mode_of(system, phase), system.topology.num_nodes, phase)
    return Arm(algorithm, chosen, further_slots=further_slots if chosen == "primary" else 0)


def arms_of(
    algorithms: Sequence[Algorithm], system: System, phase: Phase, rules: Sequence[DispatchRule] = (),
    tokens_per_gpu: int = 0, further_slots: Sequence[int] = (0,),
) -> list[Arm]:  # fmt: skip
    """One of each algorithm; affinity with each of ``rules``, without any with its default and, where that is one of
    ``static`` and ``primary`` and passes of ``tokens_per_gpu`` tell them apart, with the other too. ``primary`` with
    each of ``further_slots``, in passes that are small."""
    mode, arms = mode_of(system, phase), []
    small = served_rule("primary", system, tokens_per_gpu, mode) == "primary"
    for algorithm in algorithms:
        wanted = (rules if algorithm == "affinity" else ()) or (None,)
        arms += [default_arm(algorithm, system, phase, rule) for rule in wanted]
        if algorithm == "affinity" and not rules and arms[-1].rule in ("static", "primary"):
            other: DispatchRule = "primary" if arms[-1].rule == "static" else "static"
            if served_rule("primary", system, tokens_per_gpu, mode) != "static":
                arms.append(Arm(algorithm, other))
    each = further_slots if small else (0,)
    return [
        dataclasses.replace(arm, further_slots=further)
        for arm in arms
        for further in (each if arm.rule == "primary" else (0,))
    ]


def runs_of(
    system: System, phases: Sequence[tuple[Phase, int]], algorithms: Sequence[Algorithm], resamples: int,
    rules: Sequence[DispatchRule] = (), further_slots: Sequence[int] = (0,),
) -> int:  # fmt: skip
    """How often :func:`simulate` reports progress: after each map and each batch."""
    arms = (arms_of(algorithms, system, phase, rules, tokens, further_slots) for phase, tokens in phases)
    return sum(map(len, arms)) * (resamples + 1)


def mode_of(system: System, phase: Phase) -> DeepEPMode:
    return system.serving.prefill_mode if phase == "prefill" else system.serving.decode_mode


def with_mode(system: System, phase: Phase, mode: DeepEPMode) -> System:
    field = {"prefill": "prefill_mode", "decode": "decode_mode"}[phase]
    return dataclasses.replace(system, serving=dataclasses.replace(system.serving, **{field: mode}))  # type: ignore[arg-type]


def served_rule(rule: DispatchRule, system: System, tokens_per_gpu: int, mode: DeepEPMode) -> DispatchRule:
    """The rule that a server asked for ``rule`` follows in a pass of so many tokens on each GPU, in ``mode``."""
    if rule != "primary":
        return rule
    model, redundant = system.model, system.serving.redundant_experts
    if tokens_per_gpu <= most_tokens(model.experts, redundant, model.top_k, system.cluster.gpus, True):
        return rule
    return "static" if mode == "low_latency" else LARGE_PASS_RULE


def served_arm(arm: Arm, system: System, tokens_per_gpu: int, mode: DeepEPMode) -> Arm:
    """``arm`` as a server serves such passes."""
    rule = served_rule(arm.rule, system, tokens_per_gpu, mode)
    return dataclasses.replace(arm, rule=rule, further_slots=arm.further_slots if rule == "primary" else 0)


@dataclass(frozen=True)
class Interval:
    value: float
    lower: float
    upper: float

    @staticmethod
    def of(samples: Sequence[float] | np.ndarray) -> Interval:
        return Interval(
            float(np.mean(samples)), float(np.percentile(samples, LOWER)), float(np.percentile(samples, UPPER))
        )


@dataclass(frozen=True)
class PhaseResult:
    """One arm, phase and batch size on one system. Times in us (layer) and ms (step); one entry per resampled batch.

    ``load_max_over_mean`` is of single passes of ``tokens_per_gpu``, the mean of them (what ``evaluate`` calls
    ``pass_load_max_over_mean``), and ``active_slots`` those that have tokens on the GPU that has most of them.
    ``slowest``: which link or GPU was slowest in dispatch, experts and combine, and in how many of the layers.
    """

    gpus: int
    phase: Phase
    mode: DeepEPMode
    tokens_per_gpu: int
    algorithm: Algorithm
    redundant: int
    dispatch_rule: DispatchRule
    dispatch_us: Interval
    experts_us: Interval
    combine_us: Interval
    rest_us: Interval
    step_ms: Interval
    step_ms_samples: tuple[float, ...]
    layer_us: tuple[tuple[float, float, float], ...]
    gpu_fanout: float
    node_fanout: float
    load_max_over_mean: float
    active_slots: float
    slowest: dict[str, str]
    further_slots: int = 0

    @property
    def rule_text(self) -> str:
        return f"{self.dispatch_rule}+{self.further_slots}" if self.further_slots else self.dispatch_rule

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_gpu / self.step_ms.value * 1e3


def make_map(
    arm: Arm, window: RoutingWindow, system: System, mode: DeepEPMode,
    current: ExpertMap | None = None, max_moves: int | None = None, seed: int = 0,
) -> ExpertMap:  # fmt: skip
    """The map that the algorithm would make of ``window``; vanilla is what SGLang's ``auto`` picks."""
    model, topology, slots = system.model, system.topology, system.num_slots
    if arm.algorithm == "none":
        return ExpertMap.contiguous(window.num_layers, model.experts, slots)
    if arm.algorithm == "eplb":
        by_node = model.expert_groups > 1 and model.expert_groups % topology.num_nodes == 0
        groups = model.expert_groups if by_node else None
        return eplb_placement(window.counts, topology, slots, hierarchical=by_node, num_groups=groups)
    config = PlannerConfig(
        objective=mode, dispatch=arm.rule, effort=arm.effort, max_moves=max_moves, seed=seed,
        num_groups=model.num_groups, further_slots=arm.further_slots,
    )  # fmt: skip
    return plan(window, topology, slots, config, current).expert_map


def run_batch(
    tokens: np.ndarray, source: np.ndarray, scale: float, expert_map: ExpertMap, arm: Arm, model: TimeModel,
    mode: DeepEPMode, prefill: bool, tokens_per_gpu: float,
) -> tuple[list[LayerTime], np.ndarray]:  # fmt: skip
    """Times of every layer, and float64 [layers, 3]: GPU fan-out, node fan-out, load max/mean."""
    times, figures = [], []
    for layer in range(len(tokens)):
        traffic = batch_traffic(
            tokens[layer], source, expert_map, layer, model.system.topology, arm.rule, arm.further_slots
        )
        times.append(model.layer(traffic, scale, mode, prefill, tokens_per_gpu))
        figures.append((traffic.gpu_fanout, traffic.node_fanout, traffic.load_max_over_mean))
    return times, np.array(figures)


def simulate(
    system: System, source: RoutingSource, phases: Sequence[tuple[Phase, int]], algorithms: Sequence[Algorithm], *,
    resamples: int = 8, rules: Sequence[DispatchRule] = (), effort: Effort = "fast",
    further_slots: Sequence[int] = (0,), progress: Callable[[int], object] | None = None, as_asked: bool = False,
) -> list[PhaseResult]:  # fmt: skip
    """All algorithms on the same resampled batches. ``phases``: (phase, tokens on each GPU) to run.

    ``rules``, ``further_slots`` (:func:`arms_of`) and ``effort`` are affinity's. ``progress`` is called with 1
    :func:`runs_of` times. ``as_asked``: under those rules whatever a server would do in passes of this size.
    """
    if resamples < 2:
        raise InputError(f"--resamples {resamples}: must be at least 2")
    window = source.plan_window()
    model = TimeModel(system)
    maps: dict[tuple[Arm, DeepEPMode], ExpertMap] = {}
    results = []
    for phase, tokens_per_gpu in phases:
        mode = mode_of(system, phase)
        arms = [
            dataclasses.replace(arm if as_asked else served_arm(arm, system, tokens_per_gpu, mode), effort=effort)
            for arm in arms_of(algorithms, system, phase, rules, tokens_per_gpu, further_slots)
        ]
        collected: list[list[tuple[list[LayerTime], np.ndarray, float]]] = [[] for _ in arms]
        for arm in arms:
            if (arm, mode) not in maps:
                maps[arm, mode] = make_map(arm, window, system, mode)
            if progress is not None:
                progress(1)
        for number in range(resamples):
            batch = source.batch(tokens_per_gpu, system.cluster.gpus, phase == "prefill", number)
            for arm, samples in zip(arms, collected, strict=True):
                samples.append(one_batch(batch, maps[arm, mode], arm, model, mode, phase == "prefill", tokens_per_gpu))
                if progress is not None:
                    progress(1)
        results += [
            _result(system, phase, mode, tokens_per_gpu, arm, samples)
            for arm, samples in zip(arms, collected, strict=True)
        ]
    return results


def one_batch(
    batch: tuple[np.ndarray, np.ndarray, float], expert_map: ExpertMap, arm: Arm, model: TimeModel, mode: DeepEPMode,
    prefill: bool, tokens_per_gpu: int,
) -> tuple[list[LayerTime], np.ndarray, float]:  # fmt: skip
    """Of a batch of ``source``: as :func:`run_batch`, and the step in ms with the overlap that is served."""
    tokens, source, scale = batch
    times, figures = run_batch(tokens, source, scale, expert_map, arm, model, mode, prefill, tokens_per_gpu)
    half = None
    if model.system.serving.overlap == "two_batch":
        every_other = slice(0, None, 2)
        half, _ = run_batch(
            tokens[:, every_other], source[every_other], scale, expert_map, arm, model, mode, prefill,
            tokens_per_gpu / 2,
        )  # fmt: skip
    return times, figures, model.step_ms(times, half, prefill, tokens_per_gpu)


def _result(
    system: System, phase: Phase, mode: DeepEPMode, tokens_per_gpu: int, arm: Arm,
    samples: list[tuple[list[LayerTime], np.ndarray, float]],
) -> PhaseResult:  # fmt: skip
    def stage(name: str) -> Interval:
        return Interval.of([float(np.mean([getattr(layer, name) for layer in times])) for times, _, _ in samples])

    figures = np.mean([figures for _, figures, _ in samples], axis=(0, 1))
    layers = np.mean([[(x.dispatch_us, x.experts_us, x.combine_us) for x in times] for times, _, _ in samples], axis=0)
    every = [layer for times, _, _ in samples for layer in times]
    steps = tuple(step for _, _, step in samples)
    return PhaseResult(
        system.cluster.gpus, phase, mode, tokens_per_gpu, arm.algorithm, system.serving.redundant_experts, arm.rule,
        stage("dispatch_us"), stage("experts_us"), stage("combine_us"), stage("rest_us"), Interval.of(steps), steps,
        tuple((float(row[0]), float(row[1]), float(row[2])) for row in layers),
        float(figures[0]), float(figures[1]), float(figures[2]), float(np.mean([x.active_slots for x in every])),
        {
            "dispatch": _most_common([x.dispatch_link for x in every]),
            "experts": _most_common([f"GPU {x.experts_gpu}" for x in every]),
            "combine": _most_common([x.combine_link for x in every]),
        },
        arm.further_slots,
    )  # fmt: skip


def _most_common(names: list[str]) -> str:
    name, count = Counter(names).most_common(1)[0]
    return f"{name} ({round(100 * count / len(names))} % of layers)"


def gain_pct(result: PhaseResult, baseline: PhaseResult) -> Interval:
    """How much shorter a step is than the baseline's, in %, paired by batch."""
    mine, other = np.array(result.step_ms_samples), np.array(baseline.step_ms_samples)
    return Interval.of(100 * (1 - mine / other))


def baseline_of(results: Sequence[PhaseResult], result: PhaseResult, algorithm: Algorithm) -> PhaseResult | None:
    """The result of ``algorithm`` for the same system, phase and batch."""
    for other in results:
        same = (other.gpus, other.phase, other.tokens_per_gpu) == (result.gpus, result.phase, result.tokens_per_gpu)
        if same and other.algorithm == algorithm:
            return other
    return None


def with_overlap(system: System, overlap: str) -> System:
    if overlap not in ("none", "two_batch"):
        raise InputError(f"--overlap: {overlap!r} is not one of none, two_batch")
    return dataclasses.replace(system, serving=dataclasses.replace(system.serving, overlap=overlap))  # type: ignore[arg-type]
