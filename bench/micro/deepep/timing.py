"""CUDA-event timing: warm-up, repeats, medians, and a head start for the CPU so that launches do not show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# The first iterations after the head start still wait for the other ranks.
SKIP = 2
HEAD_START_CYCLES = 4_000_000  # about 2 ms


@dataclass(frozen=True)
class Repeats:
    warm_up: int = 3
    iterations: int = 12
    repeats: int = 3


def time_stages(stages: Sequence[Callable[[], Any]], plan: Repeats, head_start: bool = True) -> np.ndarray:
    """float64 [stages, repeats, iterations - SKIP] in us: ``stages`` run one after the other in each iteration.

    With ``head_start`` the GPU first idles in a spin kernel, so that the CPU queues all work before the GPU takes it:
    what is measured then is the GPU's time alone, as inside a CUDA graph. Stages that wait for the GPU on the CPU
    must do without.
    """
    import torch

    for _ in range(plan.warm_up):
        for stage in stages:
            stage()
    torch.cuda.synchronize()
    out = np.zeros((len(stages), plan.repeats, plan.iterations))
    for repeat in range(plan.repeats):
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(len(stages) + 1)] for _ in range(plan.iterations)]
        if head_start:
            torch.cuda._sleep(HEAD_START_CYCLES)
        for row in marks:
            row[0].record()
            for number, stage in enumerate(stages):
                stage()
                row[number + 1].record()
        torch.cuda.synchronize()
        for number in range(len(stages)):
            out[number, repeat] = [row[number].elapsed_time(row[number + 1]) * 1e3 for row in marks]
    return out[:, :, SKIP:]


def time_graph(stages: Sequence[Callable[[], Any]], plan: Repeats, rounds: int = 4) -> np.ndarray:
    """float64 [1, repeats, iterations - SKIP] in us: all ``stages`` once, in a CUDA graph of ``rounds`` of them."""
    import torch

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # NCCL's watchdog asks for events in a thread of its own meanwhile, which capture in global mode does not allow.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(rounds):
            for stage in stages:
                stage()
    return time_stages([graph.replay], plan) / rounds


def summarise(times: np.ndarray) -> dict[str, float]:
    """Median, spread and the range of the repeats' medians of us [repeats, iterations]."""
    medians = np.median(times, axis=1)
    return {
        "median": round(float(np.median(times)), 2),
        "p10": round(float(np.percentile(times, 10)), 2),
        "p90": round(float(np.percentile(times, 90)), 2),
        "repeat_min": round(float(medians.min()), 2),
        "repeat_max": round(float(medians.max()), 2),
    }
