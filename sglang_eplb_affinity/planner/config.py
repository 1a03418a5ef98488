"""What the planner is told."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, DispatchRule, planned_rule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.planner.survival import SURVIVE, Survive

MOST_SEED = (1 << 32) - 1  # searches add layers and attempts to it, in 64 bits
Objective = Literal["normal", "low_latency", "mixed", "v2"]
Effort = Literal["fast", "thorough"]


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


@dataclass(frozen=True)
class PlannerConfig:
    """All settings of :func:`sglang_eplb_affinity.planner.plan`; every one has a default.

    ``objective``: what dispatch pays for. ``normal`` (DeepEP normal mode, prefill): one copy per token and destination.
    ``low_latency`` (decode): one copy per token and expert. ``mixed`` weighs them by ``prefill_share``.
    ``v2`` (DeepEP V2, prefill and decode): as ``normal``, one copy per token and rank, one per scale-out rank (node).
    ``prefill_share``: of all tokens. None: as the window recorded it (a half where it did not).
    ``max_load_increase``: largest allowed rise of the most loaded GPU over EPLB's own placement (0.01 = 1 %).
    ``load_noise_allowance``: the cap rises by so many standard errors of a GPU's load, estimated from the window's
    blocks of time: EPLB's balance is fitted to the window and holds no closer on later tokens. 0: strict on the window.
    ``p95_allowance``: a plan's load must hold in its 95th percentile too, over 16 blocks of the sample and the earlier
    windows: at most this fraction above EPLB's placement, or above what the plan falls back to. None: the mean decides.
    ``shift_weight``: of what a GPU's load would deviate by in the windows before this one (``RoutingWindow.earlier``),
    against dispatch; multiplies the measured default. 0: the window alone counts.
    ``dispatch``: the rule that the server really uses; traffic and load are planned and judged with it. ``primary``
    becomes the rule of a server's large passes, and sets ``even_primaries``.
    ``even_primaries``: every map allows as many primary slots on each GPU, whatever that costs (even_primaries.py).
    ``further_slots``: of each GPU, that small passes use besides the primaries (further_slots.py); needs those.
    ``incremental``: improve the current map instead of planning anew; only experts that pay for their move are moved.
    ``warm_start``: the search starts from the current map, less hot, wherever that costs less than EPLB's: a plan then
    refines it and moves less. A layer for which that fails is planned anew.
    ``max_moves``: at most so many experts newly placed on each rank in each layer; makes the plan incremental.
    ``max_changes``: slots of a GPU whose content may change in a layer; bounds how those of ``primary`` are ordered
    (slot_order.py). None: any number.
    ``move_cost``: what one moved expert must save in an incremental plan, in copies to another GPU per million tokens.
    An expert of DeepSeek-V3 is as large as 6000 tokens; over 4 million tokens between rebalances that makes 1500.
    ``minimum_gain``: with a current map, a layer moves only if it gains this fraction: of its dispatch cost, or of its
    most loaded GPU's load without costing dispatch more; where the current map loads a GPU over the cap, load alone
    decides. None: the plan is taken as it is.
    ``node_weight``: cost of a copy to another node in copies to another GPU (RDMA against NVLink bandwidth).
    ``num_groups``: expert groups of group-limited routing (DeepSeek-V3: 8 groups, ``n_group`` in the model's config; a
    token picks from 4 of them). Where EPLB's hierarchical placement by groups dispatches for 2 % less than its global
    one, it is what a plan is measured against, load included, and the search starts from both.
    ``search_scale``: multiplies the number of proposals of the effort (a longer search for the same problem).
    ``survive``: every expert on two ranks or nodes, so that none is lost with one of them; where the slots are too few,
    as much traffic as they allow.
    ``threads``: worker threads over layers; None takes 1/16 of the cores, at least 2, at most 8.
    """

    objective: Objective = "normal"
    prefill_share: float | None = None
    max_load_increase: float = 0.01
    load_noise_allowance: float = 1.0
    p95_allowance: float | None = None
    shift_weight: float = 1.5
    effort: Effort = "fast"
    dispatch: DispatchRule = "cover"
    even_primaries: bool = False
    further_slots: int = 0
    seed: int = 0
    incremental: bool = False
    warm_start: bool = False
    max_moves: int | None = None
    max_changes: int | None = None
    move_cost: int = 1500
    minimum_gain: float | None = None
    node_weight: int = 2
    num_groups: int | None = None
    search_scale: int = 1
    survive: Survive = "none"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("objective", get_args(Objective)),
            ("effort", ("fast", "thorough")),
            ("dispatch", DISPATCH_RULES),
            ("survive", SURVIVE),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"planner: {name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.dispatch == "primary":
            object.__setattr__(self, "even_primaries", True)
        object.__setattr__(self, "dispatch", planned_rule(self.dispatch))
        if self.prefill_share is not None and not 0.0 <= self.prefill_share <= 1.0:
            raise InputError(f"planner: prefill_share={self.prefill_share} must be between 0 and 1")
        for name in ("max_load_increase", "load_noise_allowance", "shift_weight", "p95_allowance"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise InputError(f"planner: {name}={value} must be 0 or more, and finite")
        for name in ("seed", "max_moves", "move_cost", "node_weight", "further_slots", "max_changes"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"planner: {name}={value} must be 0 or more")
        if self.further_slots and not self.even_primaries:
            raise InputError(f"planner: further_slots={self.further_slots} needs dispatch primary")
        if self.seed > MOST_SEED:
            raise InputError(f"planner: seed={self.seed} must be at most {MOST_SEED}")
        if self.minimum_gain is not None and not 0.0 <= self.minimum_gain < 1.0:
            raise InputError(f"planner: minimum_gain={self.minimum_gain} must be a fraction, 0 to below 1")
        if self.search_scale < 1:
            raise InputError(f"planner: search_scale={self.search_scale} must be at least 1")
        if self.num_groups is not None and self.num_groups < 1:
            raise InputError(f"planner: num_groups={self.num_groups} must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"planner: threads={self.threads} must be at least 1")

    @property
    def keeps_current(self) -> bool:
        """Whether the plan starts from the current map."""
        return self.incremental or self.max_moves is not None

    @property
    def normal_share(self) -> float:
        """The share of traffic that pays per destination (the rest pays per expert)."""
        share = 0.5 if self.prefill_share is None else self.prefill_share
        return {"normal": 1.0, "v2": 1.0, "low_latency": 0.0, "mixed": share}[self.objective]

    def for_window(self, window: RoutingWindow) -> PlannerConfig:
        """With the window's share of prefill, if none was given."""
        return self if self.prefill_share is not None else replace(self, prefill_share=window.prefill_share)

    def resolved_threads(self) -> int:
        cores = usable_cores()
        return self.threads or min(cores, max(2, min(8, cores // 16)))
