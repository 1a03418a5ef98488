"""Planning settings of both kinds of rounds, and the synchronous ones of this rank."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from typing import Any, cast

import numpy as np

from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import warm_up
from sglang_eplb_affinity.planner.config import usable_cores
from sglang_eplb_affinity.planner.living_ranks import LivingRanks
from sglang_eplb_affinity.rebalance.first_rank import this_rank
from sglang_eplb_affinity.rebalance.layer_moves import layer_plan
from sglang_eplb_affinity.rebalance.plan_round import Algorithm, PlanSettings
from sglang_eplb_affinity.rebalance.round_record import report
from sglang_eplb_affinity.rebalance.synchronous import SynchronousRounds
from sglang_eplb_affinity.sglang_hooks import process
from sglang_eplb_affinity.sglang_hooks.settings import Settings

logger = logging.getLogger(__name__)


def synchronous(settings: Settings) -> SynchronousRounds:
    """Of this rank; each worker thread has half of a process's cores at most, since all ranks wait for rank 0."""
    planner = dataclasses.replace(settings.planner, threads=max(1, usable_cores() // 2))
    return SynchronousRounds(
        PlanSettings("affinity", planner, settings.topology, served=settings.table_rule),
        settings.algorithm,
        partial(report, observers=process.observers),
        settings.device,
        planned=settings.loads_map,
        history=None if process.loaded_map is None else process.loaded_map.history,
    )


def for_living(rounds: SynchronousRounds | None, settings: Settings, living: LivingRanks | None) -> SynchronousRounds:
    """``rounds`` of this rank, or others that follow them where ranks went or came back since.

    What is known of maps before does not fit those after. Where ranks came back nothing is kept of the map in force,
    which has nothing for them.
    """
    topology = settings.topology if living is None else living.topology
    first = 0 if living is None else int(living.ranks[0])
    remark = None if living is None else f"ranks {', '.join(map(str, living.gone))} are gone"
    if rounds is None:
        rounds = synchronous(settings)
    if rounds.remark == remark:
        return rounds
    changed = SynchronousRounds(
        dataclasses.replace(rounds.settings, topology=topology),
        rounds.algorithm,
        rounds.report,
        rounds.device,
        planned=rounds.planned and living is not None,
        first_rank=first,
        remark=remark,
    )
    changed.number = rounds.number
    return changed


def plan_settings(settings: Settings, rows: int, model_config: Any) -> PlanSettings:
    """How the planner process plans; ``auto`` is resolved as SGLang does."""
    plans = PlanSettings(
        "affinity", settings.planner, settings.topology, rows, settings.eplb_nodes, served=settings.table_rule
    )
    if settings.ours:
        return plans
    from sglang.srt.eplb.eplb_algorithms import compute_algorithm
    from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation

    groups = ModelConfigForExpertLocation.from_model_config(model_config).num_groups
    algorithm = compute_algorithm(settings.algorithm, groups, settings.eplb_nodes).name
    return dataclasses.replace(plans, algorithm=cast(Algorithm, algorithm), expert_groups=groups)


def staging_rows(settings: Settings, local_slots: int) -> int:
    """Slots of a rank that can change in a layer at once in asynchronous rounds."""
    most = settings.planner.max_moves
    return min(most, local_slots) if settings.ours and most is not None else local_slots


def warm_up_planner(settings: Settings) -> None:
    """Compile or load kernels before the server is ready, not at the first rebalance: the planner's on rank 0, on all
    ranks that of the static dispatch table."""
    if not settings.ours or settings.asynchronous is not None:
        return  # with --eplb-async the planner process warms up by itself, and fills the tables
    try:
        if settings.table_rule in ("static", "primary"):
            layer_plan(0, np.zeros(1, np.int32), np.zeros(1, np.int32), 1, Topology(1), settings.table_rule)
        if this_rank() == 0:
            logger.info("[eplb-affinity] planner ready after %.1f s", warm_up(settings.planner_from_scratch))
    except Exception:  # the first rebalance will say it again and keep the map in force
        logger.exception("[eplb-affinity] planner could not be warmed up")
