"""What ``evaluate`` measures on: the tokens of a trace or of dumps, or counts where no token sets were recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sglang_eplb_affinity.cli.options import say
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.reading import name_of
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.formats.dumps import dense_rows, read_dumps


@dataclass(frozen=True)
class Recorded:
    """What to evaluate on: ``trace``, or ``counts`` int64 [layers, experts] where token sets were not recorded.

    ``layers``: those of the recording that have tokens (a dump has dense layers too); None: all ``num_layers``.
    """

    path: str
    num_experts: int
    num_layers: int
    trace: RoutingTrace | None = None
    counts: np.ndarray | None = None
    layers: np.ndarray | None = None

    def restrict(self, expert_map: ExpertMap, dense_layers: int, source: str) -> ExpertMap:
        """The rows of the layers that have tokens."""
        fitting = expert_map.aligned(self.num_layers, dense_layers, source, self.path)
        if self.layers is None:
            return fitting
        return ExpertMap(fitting.physical_to_logical[self.layers], fitting.num_experts)


def of_trace(path: Path) -> Recorded:
    trace = RoutingTrace.load(path)
    return Recorded(name_of(path), trace.num_experts, trace.num_layers, trace)


def of_dumps(paths: Sequence[Path], dense_layers: int) -> Recorded:
    """One dump, or several as one, weighed by their tokens."""
    name = name_of(paths[0]) if len(paths) == 1 else f"all {len(paths)} dumps"
    window = read_dumps(paths, note=say)
    dense_rows(window, dense_layers, name)
    layers = np.flatnonzero(window.counts.any(1))
    if not len(layers):
        raise InputError(f"{name}: empty, no tokens were recorded")
    if window.tokens is None or not (window.tokens >= 0).any():
        say(f"{name}: holds counts only: load is known, if replicas share evenly; fan-outs and copies are not")
        return Recorded(name, window.num_experts, window.num_layers, None, window.counts[layers], layers)
    layers = np.flatnonzero((window.tokens >= 0).any((1, 2)))
    tokens = window.tokens[layers].transpose(1, 0, 2)
    whole = tokens[(tokens >= 0).all((1, 2))]
    if not len(whole):
        raise InputError(f"{name}: no token was recorded in all of its layers")
    trace = RoutingTrace(whole, window.num_experts, source=name)
    return Recorded(name, window.num_experts, window.num_layers, trace, None, layers)
