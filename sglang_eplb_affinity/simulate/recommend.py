"""From a recording and a topology to a setting with its predicted gain, or to "do not enable it, here is why".

Every candidate (algorithm x redundant experts x DeepEP mode x affinity's dispatch rules) runs on the same held-out
batches. A candidate is recommended over a simpler one only if even the pessimistic end of its gain exceeds
``min_gain_pct``. That end joins the resampling interval with the calibration's error: dispatch and combine times scaled
by 0.85 and by 1.15.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.simulate.replay import HOURS, Day, DayResult, Policy, PolicyName, best_interval
from sglang_eplb_affinity.simulate.scenario import (
    ALGORITHMS,
    Interval,
    Phase,
    PhaseResult,
    mode_of,
    runs_of,
    simulate,
    with_mode,
)
from sglang_eplb_affinity.simulate.source import RoutingSource
from sglang_eplb_affinity.simulate.system import DeepEPMode, System, divisible_redundancy

CALIBRATION_ERROR = 0.15
# Decode in DeepEP's normal mode cannot be captured in a CUDA graph (SGLang 0.5.17): kernel launches of one layer.
EAGER_US_PER_LAYER = 150.0
DAY_WINDOWS = 16
FURTHER_SLOTS = (0, 1, 2, 4)


@dataclass(frozen=True)
class Candidate:
    """One setting and its prediction."""

    result: PhaseResult
    layers: int
    eager_ms: float

    @property
    def name(self) -> str:
        r = self.result
        return f"{r.algorithm}, {r.redundant} redundant, {r.mode}, {r.rule_text} dispatch"

    def step_ms(self, communication: float = 1.0) -> np.ndarray:
        """float64 [batches], with dispatch and combine times scaled by ``communication``."""
        extra = (communication - 1) * self.layers * (self.result.dispatch_us.value + self.result.combine_us.value) / 1e3
        return np.array(self.result.step_ms_samples) + extra + self.eager_ms


def gain(candidate: Candidate, baseline: Candidate) -> Interval:
    """Shorter step in %, with resampling and calibration error in the interval."""
    samples = []
    for factor in (1 - CALIBRATION_ERROR, 1.0, 1 + CALIBRATION_ERROR):
        samples.append(100 * (1 - candidate.step_ms(factor) / baseline.step_ms(factor)))
    middle = Interval.of(samples[1])
    return Interval(
        middle.value,
        min(float(np.percentile(part, 5)) for part in samples),
        max(float(np.percentile(part, 95)) for part in samples),
    )


@dataclass(frozen=True)
class Recommendation:
    """The choice for one phase. ``enable`` is False where nothing beats running without EPLB by enough."""

    phase: Phase
    enable: bool
    chosen: Candidate
    over_none: Interval
    over_eplb: Interval | None
    reasons: tuple[str, ...]
    candidates: tuple[Candidate, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "enable": self.enable,
            "algorithm": self.chosen.result.algorithm,
            "redundant_experts": self.chosen.result.redundant,
            "deepep_mode": self.chosen.result.mode,
            "dispatch_rule": self.chosen.result.dispatch_rule,
            "further_slots": self.chosen.result.further_slots,
            "pass_tokens": self.chosen.result.tokens_per_gpu,
            "pass_load_max_over_mean": self.chosen.result.load_max_over_mean,
            "step_ms": float(self.chosen.step_ms().mean()),
            "gain_pct_over_none": dataclasses.asdict(self.over_none),
            "gain_pct_over_best_eplb": None if self.over_eplb is None else dataclasses.asdict(self.over_eplb),
            "reasons": list(self.reasons),
            "candidates": [
                {
                    "name": c.name,
                    "step_ms": float(c.step_ms().mean()),
                    "load": c.result.load_max_over_mean,
                    "active_slots": c.result.active_slots,
                    "pass_load_max_over_mean": c.result.load_max_over_mean,
                }
                for c in self.candidates
            ],
        }


def redundancy_choices(system: System) -> list[int]:
    """The fewest redundant experts that divide, and the topology's own number."""
    experts, gpus = system.model.experts, system.cluster.gpus
    wanted = divisible_redundancy(experts, gpus, system.serving.redundant_experts)
    return sorted({divisible_redundancy(experts, gpus, 0), wanted})


def modes_of(system: System, phase: Phase) -> tuple[DeepEPMode, ...]:
    """Modes of DeepEP V1 to compare, or the topology's. Between nodes nobody has published normal mode's latency for
    the few tokens of a decode step, and a guess would decide; so there decode stays in the topology's mode."""
    if phase == "prefill":
        return (system.serving.prefill_mode,)
    if system.topology.num_nodes > 1 or system.serving.decode_mode == "v2":
        return (system.serving.decode_mode,)
    return ("low_latency", "normal")


def further_choices(system: System, phase: Phase) -> tuple[int, ...]:
    """Slots of a GPU besides the primaries to compare, for small passes of low-latency mode over several nodes, where a
    second slot may save more on the link than its weights cost. All of them are ``static``."""
    if system.topology.num_nodes == 1 or mode_of(system, phase) != "low_latency":
        return (0,)
    on_each = system.serving.redundant_experts // system.cluster.gpus
    return tuple(further for further in FURTHER_SLOTS if further < max(on_each, 1))


def _setups(
    system: System, phase: Phase, redundancies: Sequence[int] | None, modes: Sequence[DeepEPMode] | None
) -> list[System]:
    sized = []
    for redundant in redundancies or redundancy_choices(system):
        for mode in modes or modes_of(system, phase):
            of_mode = with_mode(system, phase, mode)
            serving = dataclasses.replace(of_mode.serving, redundant_experts=redundant)
            sized.append(dataclasses.replace(of_mode, serving=serving))
    return sized


def evaluate_candidates(
    system: System, source: RoutingSource, phase: Phase, tokens: int, resamples: int,
    progress: Callable[[int], object] | None = None, redundancies: Sequence[int] | None = None,
    rules: Sequence[DispatchRule] = (), modes: Sequence[DeepEPMode] | None = None,
) -> list[Candidate]:  # fmt: skip
    """Every candidate of one phase, with each of ``redundancies`` and ``modes`` (without: :func:`redundancy_choices`,
    :func:`modes_of`), affinity under each of ``rules`` (:func:`arms_of` without) and ``primary`` with each of
    :func:`further_choices`. ``tokens`` of each GPU are one pass,
    which load is judged on."""
    out = []
    for sized in _setups(system, phase, redundancies, modes):
        eager = phase == "decode" and mode_of(sized, phase) == "normal"
        eager_ms = system.model.layers * EAGER_US_PER_LAYER / 1e3 if eager else 0.0
        found = simulate(
            sized, source, [(phase, tokens)], ALGORITHMS, resamples=resamples, rules=rules,
            further_slots=further_choices(sized, phase), progress=progress,
        )  # fmt: skip
        out += [Candidate(result, system.model.moe_layers, eager_ms) for result in found]
    return out


def candidate_runs(
    system: System, phase: Phase, tokens: int, resamples: int, redundancies: Sequence[int] | None = None,
    rules: Sequence[DispatchRule] = (), modes: Sequence[DeepEPMode] | None = None,
) -> int:  # fmt: skip
    """How often ``evaluate_candidates`` reports progress."""
    return sum(
        runs_of(sized, [(phase, tokens)], ALGORITHMS, resamples, rules, further_choices(sized, phase))
        for sized in _setups(system, phase, redundancies, modes)
    )


def decide(phase: Phase, candidates: Sequence[Candidate], min_gain_pct: float) -> Recommendation:
    """The simplest candidate that no other beats by ``min_gain_pct`` for sure."""

    def best(algorithm: str) -> Candidate:
        return min((c for c in candidates if c.result.algorithm == algorithm), key=lambda c: float(c.step_ms().mean()))

    none, eplb, affinity = best("none"), best("eplb"), best("affinity")
    eplb_gain, affinity_gain = gain(eplb, none), gain(affinity, eplb)
    over_none = gain(affinity, none)
    reasons = [_where_time_goes(eplb)]
    if affinity_gain.lower >= min_gain_pct and over_none.lower >= min_gain_pct:
        reasons.append(_why_affinity(affinity, eplb))
        return Recommendation(phase, True, affinity, over_none, affinity_gain, tuple(reasons), tuple(candidates))
    if affinity_gain.lower >= min_gain_pct:
        reasons.append(
            f"affinity against EPLB: {_text(affinity_gain)}, but affinity against no EPLB: {_text(over_none)}; "
            f"not surely {min_gain_pct:g} % or more"
        )
    else:
        reasons.append(
            f"affinity against EPLB: {_text(affinity_gain)}; not surely {min_gain_pct:g} % or more"
            + (", " + _why_not(affinity, eplb) if affinity_gain.value < min_gain_pct else "")
        )
    if eplb_gain.lower >= min_gain_pct:
        return Recommendation(phase, True, eplb, eplb_gain, None, tuple(reasons), tuple(candidates))
    reasons.append(f"EPLB against no EPLB: {_text(eplb_gain)}; not surely {min_gain_pct:g} % or more")
    if none.result.load_max_over_mean < 1.15:
        reasons.append(f"the load is even already: busiest GPU {none.result.load_max_over_mean:.2f} times the mean")
    return Recommendation(phase, False, none, Interval(0.0, 0.0, 0.0), None, tuple(reasons), tuple(candidates))


def _text(interval: Interval) -> str:
    return f"{interval.value:+.1f} % [{interval.lower:+.1f}, {interval.upper:+.1f}]"


def _where_time_goes(c: Candidate) -> str:
    r = c.result
    parts = {"dispatch": r.dispatch_us, "experts": r.experts_us, "combine": r.combine_us, "other": r.rest_us}
    total = sum(part.value for part in parts.values())
    shares = ", ".join(f"{name} {100 * part.value / total:.0f} %" for name, part in parts.items())
    return f"a layer under EPLB: {shares}"


def _why_affinity(affinity: Candidate, eplb: Candidate) -> str:
    a, e = affinity.result, eplb.result
    return (
        f"GPU fan-out {e.gpu_fanout:.2f} to {a.gpu_fanout:.2f}, node fan-out {e.node_fanout:.2f} to "
        f"{a.node_fanout:.2f}, load {e.load_max_over_mean:.2f} to {a.load_max_over_mean:.2f}, "
        f"active slots of the busiest GPU {e.active_slots:.1f} to {a.active_slots:.1f}"
    )


def _why_not(affinity: Candidate, eplb: Candidate) -> str:
    a, e = affinity.result, eplb.result
    if a.mode == "low_latency":
        return (
            "since low latency sends one copy for each (token, expert): fan-out does not matter, only replicas on the "
            f"token's own node would ({a.redundant} redundant experts here)"
        )
    if a.load_max_over_mean > e.load_max_over_mean + 0.03:
        return (
            f"since its load on tokens it was not planned on is {a.load_max_over_mean:.2f}, EPLB's "
            f"{e.load_max_over_mean:.2f}"
        )
    communication = a.dispatch_us.value + a.combine_us.value
    share = communication / (communication + a.experts_us.value + a.rest_us.value)
    return (
        f"since communication is {100 * share:.0f} % of a layer and GPU fan-out is {a.gpu_fanout:.2f} instead of "
        f"{e.gpu_fanout:.2f}"
    )


def recommend_interval(
    system: System, source: RoutingSource, recommendation: Recommendation, tokens: int,
    progress: Callable[[int], object] | None = None,
) -> DayResult:  # fmt: skip
    """The best rebalance interval for the recommended algorithm on a day of drifting domains."""
    chosen = recommendation.chosen.result
    name: PolicyName = "affinity-async" if chosen.algorithm == "affinity" else "vanilla"
    serving = dataclasses.replace(system.serving, redundant_experts=chosen.redundant)
    sized = dataclasses.replace(system, serving=serving)
    day = Day(sized, source, prefill=recommendation.phase == "prefill", windows=DAY_WINDOWS, tokens_per_gpu=tokens)
    rule = chosen.dispatch_rule if chosen.algorithm == "affinity" else None
    results = day.run(
        [
            Policy("none", 0),
            *(Policy(name, every, rule=rule, further_slots=chosen.further_slots) for every in (1, 2, 4, 8, -1)),
        ],
        progress,
    )
    return best_interval(results, name)


def interval_passes(result: DayResult) -> int:
    """Forward passes between two rebalances, for ``--eplb-rebalance-num-iterations``; 0: once."""
    if result.policy.every < 1:
        return 0
    seconds = HOURS * 3600 / len(result.windows) * result.policy.every
    return 100 * round(seconds / (result.mean("step_ms") / 1e3) / 100)
