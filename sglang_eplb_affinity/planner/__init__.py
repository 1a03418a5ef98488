"""The planner: which expert goes to which slot, so that tokens visit few GPUs and nodes at EPLB's load balance."""

from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.core import plan
from sglang_eplb_affinity.planner.eplb import eplb_placement
from sglang_eplb_affinity.planner.guard import drifted_layers, guarded_map
from sglang_eplb_affinity.planner.report import MapQuality, Plan, PlanReport
from sglang_eplb_affinity.planner.warm_up import warm_up

__all__ = [
    "MapQuality",
    "Plan",
    "PlanReport",
    "PlannerConfig",
    "drifted_layers",
    "eplb_placement",
    "guarded_map",
    "plan",
    "warm_up",
]
