"""One case of the study: maps, dealers, and the steps that they make; and the decision by the rule of the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.requests.dealing import Dealer, Dealt, Nearest, RoundRobin, SamePrompt, ShortestQueue, deal
from bench.requests.joint import Search, anneal, spread_map
from bench.requests.labels import CopyCost, align_labels, nearness
from bench.requests.steps import measure_steps
from bench.requests.workload import Requests, StudyTraces, sequence_of
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, plan
from sglang_eplb_affinity.simulate.scenario import PHASES, Phase
from sglang_eplb_affinity.simulate.system import DeepEPMode, System, divisible_redundancy
from sglang_eplb_affinity.simulate.timing import TimeModel

LAYOUTS = ((8, 2), (2, 2), (16, 2), (2, 1), (8, 1), (32, 4), (4, 1))
BANDS = (0.02, 0.1)  # of the requests that run on a rank
STEPS = 3
SEARCHED = ((2, 2), (8, 2))  # layouts for which placement and routing are searched together
MOST_ALIGNED = 256
SAMPLE_TOKENS = 8192
LEAST_GAIN, MOST_WORSE = 0.05, 0.02


@dataclass(frozen=True)
class Case:
    gpus: int
    nodes: int
    redundant: int

    @property
    def label(self) -> str:
        return f"{self.gpus}x{self.nodes}+{self.redundant}"


def cases_for(num_experts: int) -> list[Case]:
    """Each layout with few (1/8 of the experts) and many (1/2) redundant experts, or the next number that divides."""
    out = []
    for gpus, nodes in LAYOUTS:
        few, many = (divisible_redundancy(num_experts, gpus, num_experts // part) for part in (8, 2))
        out += [Case(gpus, nodes, few), Case(gpus, nodes, num_experts if many == few else many)]
    return list(dict.fromkeys(out))


def system_for(system: System, case: Case, num_experts: int, top_k: int) -> System:
    """The system's sizes and rates, with the trace's experts and the case's GPUs."""
    return dataclasses.replace(
        system,
        cluster=dataclasses.replace(system.cluster, gpus=case.gpus, gpus_per_node=case.gpus // case.nodes),
        model=dataclasses.replace(system.model, experts=num_experts, top_k=top_k, expert_groups=1, groups_per_token=1),
        serving=dataclasses.replace(system.serving, redundant_experts=case.redundant),
    )


def mode_and_rule(phase: Phase) -> tuple[DeepEPMode, DispatchRule]:
    return ("normal", "cover") if phase == "prefill" else ("low_latency", "static")


class CaseStudy:
    """Maps of one case are made once for each of DeepEP's modes. ``search`` None: only the planner's maps."""

    def __init__(self, traces: StudyTraces, case: Case, system: System, search: Search | None) -> None:
        trace = traces.plan.trace
        self.traces, self.case, self.search = traces, case, search
        self.model = TimeModel(system_for(system, case, trace.num_experts, trace.top_k))
        self.topology = Topology(case.gpus, case.nodes)
        self.cost = CopyCost.of(self.topology, system.cluster.nvlink_gb_per_s, system.cluster.rdma_gb_per_s)
        chosen = np.random.default_rng(0).permutation(len(traces.plan))[:MOST_ALIGNED]
        self._aligned_on = np.sort(chosen)
        self._signatures = traces.plan.answer_signature()
        self._window = RoutingWindow.from_trace(trace, SAMPLE_TOKENS)

    def maps(self, phase: Phase) -> dict[str, ExpertMap]:
        """Labels aligned in all: with round robin or the shortest queue they make no difference.

        ``planned``: by the planner for the phase's mode; ``planned, normal``: in decode, its map for normal mode;
        ``searched``: this study's search without knowing ranks; ``joint``: the same search for aligned ranks.
        """
        mode, rule = mode_and_rule(phase)
        out = {"planned": self._planned(mode, rule)}
        if phase == "decode":
            out["planned, normal"] = self._planned("normal", "cover")
        if self.search is not None and (self.case.gpus, self.case.nodes) in SEARCHED:
            out["searched"], out["joint"] = self._searched(mode, self.search)
        return out

    def _planned(self, mode: DeepEPMode, rule: DispatchRule) -> ExpertMap:
        slots = self._window.num_experts + self.case.redundant
        made = plan(self._window, self.topology, slots, PlannerConfig(objective=mode, dispatch=rule)).expert_map
        return self._align(made)[0]

    def _searched(self, mode: DeepEPMode, search: Search) -> tuple[ExpertMap, ExpertMap]:
        trace = self.traces.plan.trace
        start = spread_map(self._window.counts, self.topology, trace.num_experts + self.case.redundant)
        in_turn = np.unique(sequence_of(trace), return_inverse=True)[1] % self.case.gpus
        searched, ranks = self._align(anneal(start, trace, in_turn, self.topology, mode, self.cost, search))
        joint = anneal(searched, trace, self._sources(ranks), self.topology, mode, self.cost, search)
        return searched, self._align(joint)[0]

    def _align(self, expert_map: ExpertMap) -> tuple[ExpertMap, np.ndarray]:
        return align_labels(expert_map, self.topology, self._signatures[self._aligned_on], self.cost)

    def _sources(self, ranks: np.ndarray) -> np.ndarray:
        """int64 [tokens] of the plan trace: aligned requests where they were dealt, the others in turn."""
        of_request = np.arange(len(self.traces.plan)) % self.case.gpus
        of_request[self._aligned_on] = ranks
        source = np.arange(self.traces.plan.trace.num_tokens) % self.case.gpus
        for rows, rank in zip(self.traces.plan.rows, of_request, strict=True):
            source[rows] = rank
        return source

    def rows(self) -> Iterator[dict[str, Any]]:
        for phase in PHASES:
            yield from self._phase(phase)

    def _phase(self, phase: Phase) -> Iterator[dict[str, Any]]:
        test, serving = self.traces.test, self.model.system.serving
        mode, rule = mode_and_rule(phase)
        per_gpu = serving.prefill_tokens_per_gpu if phase == "prefill" else serving.decode_batch_per_gpu
        # A prefill is dealt by what only the answer shows: more than any server could know (see the page).
        known = test.answer_signature() if phase == "prefill" else test.prompt_signature()
        blind = {name: self._deal(test, dealer) for name, dealer in _blind_dealers(serving.decode_batch_per_gpu)}
        for name, expert_map in self.maps(phase).items():
            score = self._scores(known, expert_map)
            dealt = dict(blind)
            for band in BANDS:
                most = max(1, round(band * serving.decode_batch_per_gpu))
                dealt[f"nearest, band {band:.0%}"] = self._deal(test, Nearest(score, most))
            for dealer_name, result in dealt.items():
                figures = measure_steps(test, result.steps, expert_map, self.model, phase, mode, rule, per_gpu)
                yield {
                    "trace": self.traces.name, "case": self.case.label, "gpus": self.case.gpus,
                    "nodes": self.case.nodes, "redundant": self.case.redundant, "phase": phase, "map": name,
                    "dealer": dealer_name, "queue_max_over_mean": result.queue_max_over_mean,
                    "repeats_hit": result.repeats_hit, **dataclasses.asdict(figures),
                }  # fmt: skip

    def _scores(self, known: np.ndarray, expert_map: ExpertMap) -> np.ndarray:
        """Nearness beyond that of the plan trace's mean request: a rank that all want is no choice."""
        usual = nearness(self._signatures, expert_map, self.topology, self.cost).mean(0)
        return nearness(known, expert_map, self.topology, self.cost) - usual

    def _deal(self, test: Requests, dealer: Dealer) -> Dealt:
        lengths = np.array([len(rows) for rows in test.rows]) - test.cuts
        return deal(dealer, lengths, self.case.gpus, self.model.system.serving.decode_batch_per_gpu, STEPS)


def _blind_dealers(running: int) -> list[tuple[str, Dealer]]:
    return [
        ("round robin", RoundRobin()), ("shortest queue", ShortestQueue()),
        ("same prompt", SamePrompt(max(1, round(BANDS[0] * running)))),
    ]  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """One trace, case and phase. ``base``: the fastest row that does not look at experts, ``best`` the fastest dealt by
    experts with load and queue within the rule, ``any``: the fastest whatever these. Gains in % of the base's step."""

    base: dict[str, Any]
    best: dict[str, Any] | None
    any: dict[str, Any]

    @staticmethod
    def gain(row: dict[str, Any] | None, base: dict[str, Any], name: str = "step_ms") -> float:
        return 0.0 if row is None else 100 * (1 - row[name] / base[name])

    @property
    def gain_pct(self) -> float:
        return self.gain(self.best, self.base)


def verdict(rows: Sequence[dict[str, Any]]) -> Verdict:
    """Of the rows of one trace, case and phase."""
    near = [row for row in rows if row["dealer"].startswith("nearest")]
    blind = [row for row in rows if row["dealer"] in ("round robin", "shortest queue") and row["map"] != "joint"]
    base = min(blind, key=lambda row: row["step_ms"])
    bounds = {name: base[name] * (1 + MOST_WORSE) for name in ("load_max_over_mean", "queue_max_over_mean")}
    allowed = [row for row in near if all(row[name] <= bound for name, bound in bounds.items())]
    return Verdict(
        base, min(allowed, key=lambda row: row["step_ms"], default=None), min(near, key=lambda row: row["step_ms"])
    )


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["trace"], row["case"], row["phase"]), []).append(row)
    return [verdict(group) for group in groups.values()]


def decision(found: Sequence[Verdict]) -> bool:
    """Whether two traces (at least) have a case that gains enough."""
    return len({v.base["trace"] for v in found if v.gain_pct >= 100 * LEAST_GAIN}) >= 2
