"""From every rank's recorded window to one plan on every rank, in a background thread of each.

Blocking gloo calls on a process group of its own, always the same ones on all ranks whatever fails on any of them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.rebalance.map_history import MapHistory
from sglang_eplb_affinity.rebalance.plan_round import PlanReply, PlanRequest, PlanSettings
from sglang_eplb_affinity.rebalance.planner_client import PlannerFailed
from sglang_eplb_affinity.rebalance.window_reduce import sample_shares

T = TypeVar("T")


class _Attempt(Generic[T]):
    """What a call gave, or the error that it raised: other ranks are told before anybody acts on either."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.result: T | None = None
        self.error: Exception | None = None
        try:
            self.result = call()
        except Exception as error:
            self.error = error


class WindowShare(Protocol):
    """What this rank recorded, on its way from the device to the host."""

    def wait(self) -> tuple[int, np.ndarray, torch.Tensor]:
        """Blocks. (tokens seen; int64 [phases, layers, experts]; int16 [layers, rows sampled, k] in random order)."""


class WindowSource(Protocol):
    """The recorder of this rank, on the thread that runs forward passes."""

    def start(self) -> None:
        """Forget what was recorded; a window begins."""

    def take(self) -> WindowShare:
        """The window so far, copied asynchronously; a new one begins."""


class Planner(Protocol):
    def plan(self, request: PlanRequest) -> PlanReply: ...


@dataclass(frozen=True)
class WindowShape:
    """Of every rank's share: ``sample_tokens`` is the most rows that a share, and their sum, can have."""

    num_layers: int
    num_experts: int
    top_k: int
    sample_tokens: int


class WindowExchange:
    """``planner`` and ``history`` (of the map at the start) on rank 0 only. ``rank``, ``world``: those of ``group``."""

    def __init__(
        self,
        shape: WindowShape,
        settings: PlanSettings,
        planner: Planner | None,
        group: dist.ProcessGroup | None,
        rank: int,
        world: int,
        history: MapHistory | None = None,
    ) -> None:
        self._history = history
        self._shape, self._settings, self._planner = shape, settings, planner
        self._group, self._rank, self._world = group, rank, world

    def plan(self, share: WindowShare, current: ExpertMap, first: bool) -> PlanReply:
        """A collective call; raises on every rank if any could not contribute, and then before anything is sent.

        What can fail on one rank alone (reading the device, memory) comes before an all-reduce that tells the others.
        """
        parts = _Attempt(share.wait)
        saw, sampled = (0, 0) if parts.result is None else (parts.result[0], parts.result[2].shape[1])
        seen, held = self._gather((saw, min(saw, sampled)), parts, "could not read its window")
        assert parts.result is not None
        _, counts, tokens = parts.result
        shares = sample_shares(seen, held, self._shape.sample_tokens)
        own = _Attempt(lambda: tokens[:, : int(shares[self._rank])].contiguous())
        room = _Attempt(lambda: self._room(counts.shape, seen, shares) if self._rank == 0 else {})
        self._gather((0, 0), room if own.error is None else own, "has no memory for the window")
        assert own.result is not None and room.result is not None
        if self._rank == 0:
            return self._broadcast(self._on_rank_0(room.result, counts, own.result, current, first))
        if seen[self._rank]:
            dist.send(torch.from_numpy(counts), self._root(), group=self._group)
            if own.result.numel():
                dist.send(own.result.view(torch.uint8), self._root(), group=self._group)
        return self._broadcast(None)

    def _gather(self, values: tuple[int, int], attempt: _Attempt[Any], what: str) -> np.ndarray:
        """int64 [2, ranks]: every rank's ``values``; raises on all ranks where ``attempt`` failed on any."""
        state = torch.zeros(3, self._world, dtype=torch.int64)
        state[:, self._rank] = torch.tensor([*values, attempt.error is not None])
        dist.all_reduce(state, group=self._group)
        if attempt.error is not None:
            raise attempt.error
        if state[2].any():
            raise RuntimeError(f"rank {int(state[2].argmax())} {what}")
        return state[:2].numpy()

    def _room(
        self, counts: tuple[int, ...], seen: np.ndarray, shares: np.ndarray
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Rank 0's memory for what other ranks send: (counts, sampled tokens) by rank that saw any token."""
        shape = self._shape
        return {
            int(rank): (
                torch.empty(counts, dtype=torch.int64),
                torch.empty(shape.num_layers, int(shares[rank]), shape.top_k, dtype=torch.int16),
            )
            for rank in np.flatnonzero(seen)
            if rank
        }

    def _on_rank_0(
        self,
        room: dict[int, tuple[torch.Tensor, torch.Tensor]],
        counts: np.ndarray,
        own: torch.Tensor,
        current: ExpertMap,
        first: bool,
    ) -> PlanReply:
        for rank, (other, tokens) in room.items():
            source = dist.get_global_rank(self._group, rank) if self._group is not None else rank
            dist.recv(other, source, group=self._group)
            if tokens.numel():
                dist.recv(tokens.view(torch.uint8), source, group=self._group)
        # From here on the others wait for an answer, whatever goes wrong.
        try:
            assert self._planner is not None
            total = sum((other.numpy() for other, _ in room.values()), counts)
            sample = torch.cat([own, *(tokens for _, tokens in room.values())], 1).numpy()
            window = RoutingWindow(total.sum(0), None, sample, phase_counts=total)
            reply = self._planner.plan(PlanRequest(window, current, self._settings, first, self._history))
            self._history = reply.history or self._history
            return reply
        except PlannerFailed as error:
            return PlanReply("failed", str(error))
        except Exception as error:
            return PlanReply("failed", f"{type(error).__name__}: {error}")

    def _root(self) -> int:
        return dist.get_global_rank(self._group, 0) if self._group is not None else 0

    def _broadcast(self, reply: PlanReply | None) -> PlanReply:
        payload = np.frombuffer(_pickled(reply) if reply is not None else b"", np.uint8)
        length = torch.tensor([len(payload)])
        dist.broadcast(length, self._root(), group=self._group)
        data = torch.from_numpy(payload.copy()) if self._rank == 0 else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, self._root(), group=self._group)
        found: PlanReply = pickle.loads(data.numpy().tobytes())
        return found


def _pickled(reply: PlanReply) -> bytes:
    try:
        return pickle.dumps(reply, protocol=5)
    except Exception as error:  # the others wait for an answer
        return pickle.dumps(PlanReply("failed", f"{type(error).__name__}: {error}"), protocol=5)
