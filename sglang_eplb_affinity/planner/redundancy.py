"""How many redundant experts: the numbers worth trying within a memory budget, and the knee of what they gain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.config import PlannerConfig
from sglang_eplb_affinity.planner.core import plan

TRIED = 7
_MANY = 1 << 32  # slots, more than any model has; a quotient of floats may be infinite


def slots_within(memory_bytes: float, expert_bytes: float, layers: int) -> int:
    """Slots of each GPU in every one of ``layers`` MoE layers that ``memory_bytes`` of the GPU hold."""
    of_slot = expert_bytes * layers
    return _MANY if memory_bytes >= _MANY * of_slot else int(memory_bytes // of_slot)


def redundancies_within(num_experts: int, num_gpus: int, slots_per_gpu: int, tried: int = TRIED) -> list[int]:
    """Redundant experts to try, rising: from the fewest that divide over the GPUs to ``slots_per_gpu`` slots on each.

    At most ``tried`` numbers, evenly spread over the ratio of slots; no more slots on a GPU than there are experts.
    Raises InputError where not even one replica of every expert fits.
    """
    fewest = -(-num_experts // num_gpus)
    most = min(slots_per_gpu, num_experts)
    if most < fewest:
        raise InputError(
            f"the memory holds {max(slots_per_gpu, 0)} experts of each layer on a GPU, but {num_experts} experts on "
            f"{num_gpus} GPUs need {fewest}"
        )
    sizes = np.unique(np.rint(np.geomspace(fewest, most, tried)).astype(int))
    return [int(size) * num_gpus - num_experts for size in sizes]


def knee(memory: Sequence[float], gain: Sequence[float]) -> int:
    """Index of the point that is farthest above the chord from the first to the last point, both axes scaled to 0..1.

    ``memory`` rises. A point that gains less than one with less memory is never it. ``gain`` is against what is served
    otherwise: where some point gains, those that lose are worth that, 0, and none of them is the knee. Source: Satopaa
    et al., "Finding a Kneedle in a Haystack" (2011), for a single curve without smoothing.
    """
    x, y = np.asarray(memory, float), np.maximum.accumulate(np.asarray(gain, float))
    if y[-1] > 0:
        y = np.maximum(y, 0.0)
    first = np.flatnonzero(y == y[-1])[0]
    if first == 0 or y[-1] <= y[0]:
        return 0
    height = (y - y[0]) / (y[-1] - y[0]) - (x - x[0]) / (x[-1] - x[0])
    return int(np.argmax(height[: first + 1])) if height.max() > 0 else int(first)


@dataclass(frozen=True)
class Tried:
    """A plan with ``redundant`` experts, means over layers; ``cost``: the objective, ``eplb_cost``: of EPLB's map."""

    redundant: int
    cost: float
    eplb_cost: float
    gpu_fanout: float
    load: float


def try_redundancies(
    window: RoutingWindow, topology: Topology, config: PlannerConfig, numbers: Sequence[int],
    progress: Callable[[int], object] | None = None,
) -> tuple[list[Tried], int]:  # fmt: skip
    """(a plan for each number, the index of the knee of what they save against EPLB at its best number)."""
    rows = []
    for redundant in numbers:
        report = plan(window, topology, window.num_experts + redundant, config, progress=progress).report
        rows.append(
            Tried(
                redundant, float(np.nanmean(report.planned.cost)), float(np.nanmean(report.eplb.cost)),
                float(np.nanmean(report.planned.gpu_fanout)), float(np.nanmean(report.planned.load_max_over_mean)),
            )
        )  # fmt: skip
    best = min(row.eplb_cost for row in rows)
    return rows, knee([row.redundant for row in rows], [1 - row.cost / best if best else 0.0 for row in rows])
