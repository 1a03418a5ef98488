"""A day of drifting traffic through trigger policy, planner and weight movement: how often to rebalance.

The share of each recorded domain rises and falls over the day, every domain with its own peak hour. The day is cut into
windows. A rebalance plans on the window before (tokens of the plan half of the recording); the window itself is served
with tokens of the test half. As a server's, plans of affinity heed the loads of its last rounds' windows. Two
upstream-like policies stop serving while they plan and move weights; the asynchronous one does not stop: it goes in up
to ``rounds`` rounds, each of which moves at most ``max_moves`` experts to each GPU and layer, and only where the plan
promises ``min_gain``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.planner import PlannerConfig, plan
from sglang_eplb_affinity.planner.earlier_windows import EARLIER_WINDOWS
from sglang_eplb_affinity.simulate.scenario import (
    Algorithm,
    Arm,
    Phase,
    default_arm,
    make_map,
    mode_of,
    run_batch,
    served_arm,
)
from sglang_eplb_affinity.simulate.source import RoutingSource
from sglang_eplb_affinity.simulate.system import System
from sglang_eplb_affinity.simulate.timing import TimeModel

PolicyName = Literal["none", "vanilla", "affinity", "affinity-async"]
HOURS = 24
_MEANS = ("step_ms", "gpu_fanout", "node_fanout", "balancedness", "pass_load_max_over_mean")
# What SGLang's updater reaches while it moves experts; of the slowest link that is used.
MOVE_SHARE = 0.5


@dataclass(frozen=True)
class Policy:
    """``every`` windows a rebalance; 0: never, -1: once, after the first window. ``rule``: affinity's replica choice in
    place of its mode's default, and ``further_slots`` of ``primary``."""

    name: PolicyName
    every: int
    max_moves: int = 2
    rounds: int = 4
    min_gain: float = 0.01
    rule: DispatchRule | None = None
    further_slots: int = 0

    def arm(self, system: System, phase: Phase) -> Arm:
        algorithms: dict[PolicyName, Algorithm] = {"none": "none", "vanilla": "eplb"}
        return default_arm(algorithms.get(self.name, "affinity"), system, phase, self.rule, self.further_slots)

    @property
    def stops_serving(self) -> bool:
        return self.name in ("vanilla", "affinity")

    def due(self, window: int) -> bool:
        return window > 0 and (window == 1 if self.every < 0 else self.every > 0 and window % self.every == 0)


@dataclass(frozen=True)
class Rebalance:
    """A new map, the seconds of planning, and the experts that moved: in all, and to the GPU that got most.

    For the simulated layers.
    """

    expert_map: ExpertMap
    plan_seconds: float
    moved: int
    busiest: int


@dataclass(frozen=True)
class WindowResult:
    """One window of one policy, seen in one pass. ``pass_load_max_over_mean``: its busiest GPU. ``stall_s``: serving
    stopped for so long before it; bytes for the whole model."""

    hour: float
    step_ms: float
    gpu_fanout: float
    node_fanout: float
    balancedness: float
    pass_load_max_over_mean: float
    rebalanced: bool
    moved_experts: int
    moved_gigabytes: float
    stall_s: float


@dataclass(frozen=True)
class DayResult:
    policy: Policy
    window_minutes: float
    windows: tuple[WindowResult, ...]

    def mean(self, name: str) -> float:
        return float(np.mean([getattr(window, name) for window in self.windows]))

    def total(self, name: str) -> float:
        return float(np.sum([getattr(window, name) for window in self.windows]))

    @property
    def effective_step_ms(self) -> float:
        """Mean step time with the stalls spread over the day's steps."""
        return self.mean("step_ms") / (1 - min(0.99, self.total("stall_s") / (HOURS * 3600)))

    def to_json(self) -> dict[str, object]:
        return {
            "policy": dataclasses.asdict(self.policy),
            "rebalance_every_minutes": self.policy.every * self.window_minutes if self.policy.every > 0 else None,
            "rebalances": int(self.total("rebalanced")),
            "effective_step_ms": self.effective_step_ms,
            **{name: self.mean(name) for name in _MEANS},
            **{name: self.total(name) for name in ("moved_experts", "moved_gigabytes", "stall_s")},
            "windows": [dataclasses.asdict(window) for window in self.windows],
        }


def domain_mix(hour: float, domains: int, sharpness: float = 3.0) -> np.ndarray:
    """float64 [domains]: shares at that hour; each domain peaks once a day, peaks evenly spread."""
    angle = 2 * math.pi * (hour / HOURS - np.arange(domains) / domains)
    weight = np.exp(sharpness * (np.cos(angle) - 1))
    return np.asarray(weight / weight.sum())


class Day:
    """The traffic of one day and what every policy makes of it."""

    def __init__(
        self, system: System, source: RoutingSource, *, prefill: bool = True, windows: int = 48,
        tokens_per_gpu: int = 1024, plan_tokens: int = 16384,
    ) -> None:  # fmt: skip
        if source.trace.domain is None or len(np.unique(source.trace.domain)) < 2:
            raise InputError(f"{source.trace.source}: has fewer than two domains; a drifting day needs `domain`")
        if windows < 4:
            raise InputError(f"--windows {windows}: must be at least 4")
        self.system, self.source, self.prefill, self.windows = system, source, prefill, windows
        self.tokens_per_gpu, self.plan_tokens = tokens_per_gpu, plan_tokens
        self.phase: Phase = "prefill" if prefill else "decode"
        self.mode = mode_of(system, self.phase)
        self.model = TimeModel(system)
        self._present = np.unique(source.trace.domain)

    def rows(self, window: int, plan: bool) -> np.ndarray:
        """Recorded tokens of the window, of the plan or the test half; runs stay together."""
        rng = np.random.default_rng([self.source.seed, window, int(plan)])
        half = self.source.plan_rows if plan else self.source.test_rows
        assert self.source.trace.domain is not None
        mix = domain_mix(HOURS * window / self.windows, len(self._present))
        picked = []
        for domain, share in zip(self._present, mix, strict=True):
            pool = half[self.source.trace.domain[half] == domain]
            runs = max(1, round(self.plan_tokens * share / 128))
            start = rng.integers(0, max(1, len(pool) - 128), runs)
            picked.append(pool[(start[:, None] + np.arange(min(128, len(pool)))).ravel() % len(pool)])
        return np.concatenate(picked)

    def window_statistics(self, window: int) -> RoutingWindow:
        return self.source.plan_window(self.rows(window, plan=True))

    def run(self, policies: Sequence[Policy], progress: Callable[[int], object] | None = None) -> list[DayResult]:
        """All policies, window by window on the same tokens; ``progress`` is called with 1 for each window."""
        minutes = 60 * HOURS / self.windows
        maps: list[ExpertMap] = []
        results: list[list[WindowResult]] = [[] for _ in policies]
        before: RoutingWindow | None = None
        # What a server remembers of its rounds' windows (rebalance/map_history.py).
        remembered: list[list[np.ndarray]] = [[] for _ in policies]
        for window in range(self.windows):
            batch = self.source.batch(
                self.tokens_per_gpu, self.system.cluster.gpus, self.prefill, window, self.rows(window, plan=False)
            )
            if before is None:
                arm = default_arm("none", self.system, self.phase)
                start = make_map(arm, self.window_statistics(0), self.system, self.mode)
                maps = [start] * len(policies)
            plans: dict[tuple[str, bytes, bytes], Rebalance] = {}
            for number, policy in enumerate(policies):
                rebalance = None
                if before is not None and policy.due(window):
                    earlier = np.stack(remembered[number]) if remembered[number] else None
                    map_bytes = maps[number].physical_to_logical.tobytes()
                    key = (policy.name, map_bytes, b"" if earlier is None else earlier.tobytes())
                    if key not in plans:
                        plans[key] = self._replan(policy, replace(before, earlier=earlier), maps[number])
                    rebalance = plans[key]
                    remembered[number] = [*remembered[number], before.shares()][-EARLIER_WINDOWS:]
                results[number].append(self._window(window, policy, batch, maps[number], rebalance))
                if rebalance is not None:
                    maps[number] = rebalance.expert_map
            before = self.window_statistics(window)
            if progress is not None:
                progress(1)
        return [DayResult(p, minutes, tuple(r)) for p, r in zip(policies, results, strict=True)]

    def _replan(self, policy: Policy, window: RoutingWindow, current: ExpertMap) -> Rebalance:
        gpus = self.system.topology.num_gpus
        if policy.name == "vanilla":
            new = make_map(policy.arm(self.system, self.phase), window, self.system, self.mode)
            return Rebalance(new, 0.0, *moves(current, new, gpus))
        moved, busiest, seconds, before = 0, 0, 0.0, current
        for _ in range(policy.rounds if policy.name == "affinity-async" else 1):
            new, took = self._plan_once(policy, window, before)
            step, most = moves(before, new, gpus)
            moved, busiest, seconds, before = moved + step, busiest + most, seconds + took, new
            if not step:
                break
        return Rebalance(before, seconds, moved, busiest)

    def _plan_once(self, policy: Policy, window: RoutingWindow, current: ExpertMap) -> tuple[ExpertMap, float]:
        """(new map, seconds that planning took for the simulated layers)."""
        capped = policy.name == "affinity-async"
        arm = policy.arm(self.system, self.phase)
        config = PlannerConfig(
            objective=self.mode, dispatch=arm.rule, further_slots=arm.further_slots,
            max_moves=policy.max_moves if capped else None, num_groups=self.system.model.num_groups,
            minimum_gain=policy.min_gain if capped else None,
        )  # fmt: skip
        planned = plan(window, self.system.topology, self.system.num_slots, config, current)
        return planned.expert_map, planned.report.seconds

    def _window(
        self, window: int, policy: Policy, batch: tuple[np.ndarray, np.ndarray, float], current: ExpertMap,
        rebalance: Rebalance | None,
    ) -> WindowResult:  # fmt: skip
        used = current if rebalance is None else rebalance.expert_map
        tokens, source, scale = batch
        times, figures = run_batch(
            tokens,
            source,
            scale,
            used,
            served_arm(policy.arm(self.system, self.phase), self.system, self.tokens_per_gpu, self.mode),
            self.model,
            self.mode,
            self.prefill,
            self.tokens_per_gpu,
        )
        moved = 0 if rebalance is None else rebalance.moved
        share = self.system.model.moe_layers / current.num_layers
        expert_bytes = self.system.model.expert_bytes
        stall = 0.0
        if rebalance is not None and policy.stops_serving:
            cluster = self.system.cluster
            link = cluster.nvlink_gb_per_s if self.system.topology.num_nodes == 1 else cluster.rdma_gb_per_s
            stall = rebalance.busiest * share * expert_bytes / (link * MOVE_SHARE * 1e9)
            stall += rebalance.plan_seconds * share
        return WindowResult(
            HOURS * window / self.windows,
            self.model.step_ms(times, None, self.prefill, self.tokens_per_gpu),
            float(figures[:, 0].mean()), float(figures[:, 1].mean()), float((1 / figures[:, 2]).mean()),
            float(figures[:, 2].mean()),
            rebalance is not None and moved > 0, round(moved * share), moved * share * expert_bytes / 1e9, stall,
        )  # fmt: skip


def moves(old: ExpertMap, new: ExpertMap, gpus: int) -> tuple[int, int]:
    """(experts newly placed on a GPU, the same for the GPU with the most), over all layers of the maps."""
    by_gpu = np.zeros(gpus, int)
    for before, after in zip(old.physical_to_logical, new.physical_to_logical, strict=True):
        for gpu, (a, b) in enumerate(zip(before.reshape(gpus, -1), after.reshape(gpus, -1), strict=True)):
            by_gpu[gpu] += len(set(b.tolist()) - set(a.tolist()))
    return int(by_gpu.sum()), int(by_gpu.max())


def standard_policies(
    every: Sequence[int], max_moves: int, min_gain: float, rounds: int = 4, rule: DispatchRule | None = None
) -> list[Policy]:
    """No EPLB, and the three algorithms at each interval (in windows; -1: once)."""
    names: tuple[PolicyName, ...] = ("vanilla", "affinity", "affinity-async")
    return [Policy("none", 0), *(Policy(name, n, max_moves, rounds, min_gain, rule) for n in every for name in names)]


def best_interval(results: Sequence[DayResult], name: PolicyName) -> DayResult:
    """The policy's result with the shortest effective step."""
    return min((r for r in results if r.policy.name == name), key=lambda r: r.effective_step_ms)
