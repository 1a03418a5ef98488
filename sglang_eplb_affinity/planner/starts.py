"""Where a search starts, beside EPLB's placement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.budget import SearchBudget
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.eplb import eplb_placement
from sglang_eplb_affinity.planner.layer_problem import LayerProblem, problem_of
from sglang_eplb_affinity.planner.layer_search import search_layer

STEPS_SHARE = 0.5  # of the proposals: half for the part, half for what the whole makes of it
HOT_SHARE = 0.3  # hotter, the whole would forget the start


def copied_start(
    problem: LayerProblem, topology: Topology, config: PlannerConfig, budget: SearchBudget
) -> LayerProblem | None:
    """``problem`` from a start where groups of GPUs hold all experts each, laid out alike, as many as the slots allow.

    A token then needs no GPU outside of its source's group. Moves and swaps of single replicas hardly find such maps:
    every step on the way costs. One group is searched as a cluster of its own. None where the slots do not hold the
    experts twice.
    """
    gpus, experts, slots = topology.num_gpus, len(problem.counts), len(problem.start)
    for copies in range(slots // experts, 1, -1):
        size = gpus // copies
        if gpus % copies or (size % topology.gpus_per_node and topology.gpus_per_node % size):
            continue
        part = Topology(size, max(1, size // topology.gpus_per_node))
        eplb = eplb_placement(problem.counts[None], part, slots // copies).physical_to_logical[0]
        smaller = problem_of(problem.counts, problem.tokens, eplb, None, part, config, budget, 0)
        group = search_layer(replace(smaller, seed=problem.seed, steps_share=STEPS_SHARE), part, config, budget)
        start = np.tile(group, copies)
        return replace(problem, start=start, hot_share=HOT_SHARE, steps_share=STEPS_SHARE)
    return None
