"""From every rank's recorded window to one plan on every rank, in a background thread of each.

Blocking gloo calls on a process group of its own, always the same ones on all ranks whatever fails on any of them.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.rebalance.plan_round import PlanReply, PlanRequest, PlanSettings
from sglang_eplb_affinity.rebalance.planner_client import PlannerFailed
from sglang_eplb_affinity.rebalance.window_reduce import sample_shares


class WindowShare(Protocol):
    """What this rank recorded, on its way from the device to the host."""

    def wait(self) -> tuple[int, np.ndarray, torch.Tensor]:
        """Blocks. (tokens seen; int64 [phases, layers, experts]; int16 [layers, sampled tokens, k] in random order)."""


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
    """``planner`` on rank 0 only. ``rank`` and ``world`` are those of ``group``."""

    def __init__(
        self,
        shape: WindowShape,
        settings: PlanSettings,
        planner: Planner | None,
        group: dist.ProcessGroup | None,
        rank: int,
        world: int,
    ) -> None:
        self._shape, self._settings, self._planner = shape, settings, planner
        self._group, self._rank, self._world = group, rank, world

    def plan(self, share: WindowShare, current: ExpertMap, first: bool) -> PlanReply:
        """A collective call; raises on every rank if any could not contribute."""
        failure: Exception | None = None
        try:
            seen, counts, tokens = share.wait()
        except Exception as error:
            failure, seen = error, 0
        state = torch.zeros(self._world, 2, dtype=torch.int64)
        state[self._rank, 0], state[self._rank, 1] = seen, failure is not None
        dist.all_reduce(state, group=self._group)
        if failure is not None:
            raise failure
        if state[:, 1].any():
            raise RuntimeError(f"rank {int(state[:, 1].argmax())} could not read its window")
        shares = sample_shares(state[:, 0].numpy(), self._shape.sample_tokens)
        own = tokens[:, : int(shares[self._rank])].contiguous()
        reply = self._on_rank_0(state[:, 0].numpy(), shares, counts, own, current, first) if self._rank == 0 else None
        if self._rank and seen:
            dist.send(torch.from_numpy(counts), self._root(), group=self._group)
            if own.numel():
                dist.send(own.view(torch.uint8), self._root(), group=self._group)
        return self._broadcast(reply)

    def _on_rank_0(
        self,
        seen: np.ndarray,
        shares: np.ndarray,
        counts: np.ndarray,
        own: torch.Tensor,
        current: ExpertMap,
        first: bool,
    ) -> PlanReply:
        shape = self._shape
        total, samples = counts.copy(), [own]
        for rank in np.flatnonzero(seen):
            if rank == 0:
                continue
            other = torch.empty(counts.shape, dtype=torch.int64)
            tokens = torch.empty(shape.num_layers, int(shares[rank]), shape.top_k, dtype=torch.int16)
            source = dist.get_global_rank(self._group, int(rank)) if self._group is not None else int(rank)
            dist.recv(other, source, group=self._group)
            if tokens.numel():
                dist.recv(tokens.view(torch.uint8), source, group=self._group)
            total += other.numpy()
            samples.append(tokens)
        assert self._planner is not None
        window = RoutingWindow(total.sum(0), None, torch.cat(samples, 1).numpy(), phase_counts=total)
        try:
            return self._planner.plan(PlanRequest(window, current, self._settings, first))
        except PlannerFailed as error:
            return PlanReply("failed", str(error))
        except Exception as error:
            return PlanReply("failed", f"{type(error).__name__}: {error}")

    def _root(self) -> int:
        return dist.get_global_rank(self._group, 0) if self._group is not None else 0

    def _broadcast(self, reply: PlanReply | None) -> PlanReply:
        payload = np.frombuffer(pickle.dumps(reply, protocol=5) if reply is not None else b"", np.uint8)
        length = torch.tensor([len(payload)])
        dist.broadcast(length, self._root(), group=self._group)
        data = torch.from_numpy(payload.copy()) if self._rank == 0 else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, self._root(), group=self._group)
        found: PlanReply = pickle.loads(data.numpy().tobytes())
        return found
