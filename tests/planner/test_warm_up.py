"""A server's first round compiles nothing: what any rule plans with is there after the warm-up."""

import subprocess
import sys

SCRIPT = """
import sys
import numpy as np
from numba.core.dispatcher import Dispatcher
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.planner.core import plan
from sglang_eplb_affinity.planner.warm_up import warm_up
from sglang_eplb_affinity.rebalance.plan_round import PlanRequest, PlanSettings, plan_round

def compiled():
    ours = [module for name, module in sys.modules.items() if name.startswith("sglang_eplb_affinity.")]
    found = [item for module in ours for item in vars(module).values() if isinstance(item, Dispatcher)]
    return {(f.py_func.__module__, f.py_func.__name__, s) for f in found for s in f.nopython_signatures}

random = np.random.default_rng(0)
tokens = np.array([[random.choice(16, 4, replace=False) for _ in range(300)]], np.int16)
window = RoutingWindow(np.bincount(tokens.ravel(), minlength=16)[None].astype(np.int64), None, tokens)
# `primary` comes last, and has more to compile.
for rule, further in [*((rule, 0) for rule in DISPATCH_RULES), ("primary", 1)]:
    config = PlannerConfig(dispatch=rule, further_slots=further)
    warm_up(config)
    before = compiled()
    assert len(before) > 10
    for topology in (Topology(4, 2), Topology(2, 1)):
        for slots in (16, 20, 24):
            plan(window, topology, slots, config)
            for algorithm in ("affinity", "deepseek"):
                settings = PlanSettings(algorithm, config, topology)
                current = ExpertMap(np.arange(slots)[None] % 16, 16)
                first = plan_round(PlanRequest(window, current, settings, first=True))
                assert first.result in ("planned", "unchanged"), first.reason
                plan_round(PlanRequest(window, current, settings, history=first.history))
    new = sorted(f"{module}.{name}" for module, name, _ in compiled() - before)
    assert not new, (rule, further, new)
"""


def test_no_rule_compiles_anything_after_the_warm_up() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
