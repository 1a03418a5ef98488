"""Requests of a recorded trace: its sequences, each cut into the tokens that are known and those that are judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingTrace

PSEUDO_REQUEST = 128
SHORTEST = 32


@dataclass(frozen=True)
class Requests:
    """Sequences of one trace. ``rows``: the token rows of each request in order; ``cuts``: where its prompt ends.

    Traces hold generated (or only prefilled) tokens without their ids: the first quarter of a request, at most 64
    tokens, stands for its prompt.
    """

    trace: RoutingTrace
    rows: tuple[np.ndarray, ...]
    cuts: np.ndarray

    @staticmethod
    def of(trace: RoutingTrace) -> Requests:
        """Raises InputError if fewer than two sequences have 32 tokens."""
        sequence = sequence_of(trace)
        found = [np.flatnonzero(sequence == s) for s in np.unique(sequence)]
        rows = tuple(r for r in found if len(r) >= SHORTEST)
        if len(rows) < 2:
            raise InputError(f"{trace.source}: {len(rows)} sequences of at least {SHORTEST} tokens, but 2 are needed")
        return Requests(trace, rows, np.array([min(64, len(r) // 4) for r in rows]))

    def __len__(self) -> int:
        return len(self.rows)

    def prompt_signature(self) -> np.ndarray:
        """float32 [requests, layers, experts]: experts of a prompt's tokens, per token."""
        return np.stack([self._histogram(r[:cut]) for r, cut in zip(self.rows, self.cuts, strict=True)])

    def answer_signature(self) -> np.ndarray:
        """float32 [requests, layers, experts]: experts of the tokens after the prompt, per token."""
        return np.stack([self._histogram(r[cut:]) for r, cut in zip(self.rows, self.cuts, strict=True)])

    def _histogram(self, rows: np.ndarray) -> np.ndarray:
        ids = self.trace.topk_ids[rows]
        flat = ids.astype(np.int64) + np.arange(self.trace.num_layers)[:, None] * self.trace.num_experts
        counts = np.bincount(flat.ravel(), minlength=self.trace.num_layers * self.trace.num_experts)
        return (counts / len(rows)).reshape(self.trace.num_layers, -1).astype(np.float32)


def sequence_of(trace: RoutingTrace) -> np.ndarray:
    """int [tokens]: the request of each token; without sequences, runs of 128 consecutive tokens."""
    return np.arange(trace.num_tokens) // PSEUDO_REQUEST if trace.sequence is None else trace.sequence


@dataclass(frozen=True)
class StudyTraces:
    """``plan``: what maps and labels are made of; ``test``: the requests that are dealt. No sequence is in both."""

    name: str
    plan: Requests
    test: Requests
    pseudo: bool

    @staticmethod
    def load(text: str) -> StudyTraces:
        """``FILE`` (even sequences plan, odd ones test) or ``PLAN,TEST`` (two files)."""
        paths = [Path(part) for part in text.split(",")]
        traces = [RoutingTrace.load(path) for path in paths]
        name = paths[0].stem.removesuffix("_plan").removesuffix("_dev").lower().replace("-", "_")
        pseudo = any(trace.sequence is None for trace in traces)
        if len(traces) == 2:
            return StudyTraces(name, Requests.of(traces[0]), Requests.of(traces[1]), pseudo)
        if len(traces) > 2:
            raise InputError(f"--trace {text}: give one file, or two joined by a comma (plan, test)")
        of_number = np.unique(sequence_of(traces[0]), return_inverse=True)[1]
        parts = [traces[0].select(of_number % 2 == part) for part in (0, 1)]
        if pseudo:  # the parts would be cut anew otherwise
            parts = [_numbered(part, of_number[of_number % 2 == number]) for number, part in enumerate(parts)]
        return StudyTraces(name, Requests.of(parts[0]), Requests.of(parts[1]), pseudo)


def _numbered(trace: RoutingTrace, sequence: np.ndarray) -> RoutingTrace:
    return RoutingTrace(trace.topk_ids, trace.num_experts, sequence, source=trace.source)
