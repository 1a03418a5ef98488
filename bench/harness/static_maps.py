"""Maps that are planned before a run and served without rebalances, for profiles with a `plan_trace`.

What is compared then is placements and rules alone: no rebalance falls into a row, and nothing has to be waited for.
Planned on one trace and loaded with another (that of --ep-forced-routing), as a server plans on earlier traffic.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from bench.harness.arms import ARMS, REDUNDANT, RULE, Arm
from bench.harness.engine import ROOT
from bench.harness.profile import ServerConfig
from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.dispatch.rules import planned_rule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan

PLANNING_TOKENS, JUDGED_TOKENS = 16384, 8192
_REPLAY = re.compile(r"replay:(?P<trace>[^,]+)")


def rule_of(config: ServerConfig, arm: Arm) -> str:
    """That a server of ``arm`` is asked for."""
    return arm.dispatch or _value(config, RULE, "static")


def planned_rule_of(config: ServerConfig, arm: Arm) -> str:
    return arm.planned_for or rule_of(config, arm)


def write_map(config: ServerConfig, arm: Arm, num_layers: int, path: Path) -> None:
    """Plan the map of ``arm`` on the profile's trace, for a model of ``num_layers`` MoE layers; nothing is done where
    it is there. A model with more layers than the trace has gets its layers in turn, as replayed routing does."""
    if path.is_file():
        return
    window = RoutingWindow.from_trace(_trace(config.plan_trace), PLANNING_TOKENS)
    topology, slots = Topology(config.ranks, config.nodes), window.num_experts + _redundant(config, arm)
    if arm.algorithm == "affinity":
        rule = planned_rule_of(config, arm)
        planner = PlannerConfig(effort="thorough", dispatch=rule, further_slots=arm.further_slots)  # type: ignore[arg-type]
        found = plan(window, topology, slots, planner).expert_map
    else:
        found = eplb_placement(window.counts, topology, slots)
    rows = np.arange(num_layers) % found.num_layers
    path.parent.mkdir(parents=True, exist_ok=True)
    ExpertMap(found.physical_to_logical[rows], found.num_experts).save(path)


def write_maps(config: ServerConfig, arms: Sequence[str], model: str, folder: Path) -> dict[str, Path]:
    """The maps that those arms serve where there is a `plan_trace`, by arm; empty without one."""
    if not config.plan_trace:
        return {}
    found = {name: folder / f"{name.removesuffix('-again')}.json" for name in arms if ARMS[name].uses_eplb}
    for name, path in found.items():
        write_map(config, ARMS[name], num_layers_of(model), path)
    return found


def placement_on_replay(config: ServerConfig, arm: Arm, path: Path | None) -> dict[str, float] | None:
    """Balancedness and fan-outs of the map on the trace that the profile replays (its own layers); ``path`` None: of
    SGLang's trivial map. None where nothing is replayed, or under a rule that the figures do not know."""
    trace = replayed_trace(config)
    if trace is None or "--ep-forced-routing" in arm.own_flags:
        return None
    window = RoutingWindow.from_trace(trace, JUDGED_TOKENS)
    layers, experts = window.counts.shape
    served = ExpertMap.contiguous(layers, experts, experts)
    if path is not None:
        served = ExpertMap.from_json(json.loads(path.read_text()), experts)
        served = replace(served, physical_to_logical=served.physical_to_logical[:layers])
    rule = planned_rule(planned_rule_of(config, arm)) if path is not None else "dynamic"  # type: ignore[arg-type]
    figures = MapFigures.of(window, served, Topology(config.ranks, config.nodes), rule)
    return None if figures is None else asdict(figures)


def replayed_trace(config: ServerConfig) -> RoutingTrace | None:
    """The trace that the servers' routing is replayed from; None where it is not."""
    match = _REPLAY.match(dict(pairwise(config.flags)).get("--ep-forced-routing", ""))
    return None if match is None else _trace(match["trace"])


def num_layers_of(model: str) -> int:
    """Of the model in folder ``model``, whose layers all have experts."""
    try:
        return int(json.loads(Path(model, "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
    except (OSError, ValueError, KeyError):
        raise InputError(f"plan_trace: {model} is not the folder of a model that says its layers") from None


def _redundant(config: ServerConfig, arm: Arm) -> int:
    return int(_value(config, REDUNDANT, "0")) if arm.redundant is None else arm.redundant


def _value(config: ServerConfig, flag: str, otherwise: str) -> str:
    return dict(pairwise(config.eplb_flags)).get(flag, otherwise)


def _trace(name: str) -> RoutingTrace:
    """Paths in profiles are those of this checkout."""
    return RoutingTrace.load(ROOT / name)
