"""Where the expert-parallel ranks are, and which path experts take between each two of them."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sglang_eplb_affinity.rebalance.host_staged import HostStagedTransfer
from sglang_eplb_affinity.rebalance.peer_copy import PeerCopyTransfer, export_handles, open_handles
from sglang_eplb_affinity.rebalance.transfer import ByHostTransfer, ExpertTransfer
from sglang_eplb_affinity.rebalance.weights import LayerWeights

logger = logging.getLogger(__name__)


def host_identity() -> str:
    """The same for processes that may share memory: one machine's name and boot, as NCCL tells hosts apart.

    By name alone, hosts that were all called `localhost` would count as one.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"


class Members:
    """Where the expert-parallel ranks are: all ranks of the same ``replica`` hold one set of the experts."""

    def __init__(self, group: dist.ProcessGroup, rank: int, replica: tuple[int, ...]) -> None:
        found: list[Any] = [None] * dist.get_world_size()
        self.group, self.rank, self.replica, self.host = group, rank, replica, host_identity()
        dist.all_gather_object(found, (replica, rank, self.host), group=group)
        self.global_rank = {r: world_rank for world_rank, (of, r, _) in enumerate(found) if of == replica}
        self.on_this_host = frozenset(r for of, r, host in found if of == replica and host == self.host)


def make_transfer(
    weights: dict[int, LayerWeights],
    members: Members,
    group: dist.ProcessGroup,
    device: torch.device,
    rows: int,
    row_bytes: int,
    limit_seconds: float,
) -> ExpertTransfer:
    """Peer copies within this host where all its ranks can map each other's weights, host-staged messages beyond."""
    near: frozenset[int] = frozenset()
    sources: dict[int, Any] = {members.rank: weights}
    if device.type == "cuda":
        near, sources = _peers(weights, members, device)
    if near == frozenset(members.global_rank):
        return PeerCopyTransfer(sources, device)
    far = HostStagedTransfer(
        weights,
        members.rank,
        members.global_rank.__getitem__,
        group,
        device,
        near=near,
        rows=rows,
        row_bytes=row_bytes,
        limit_seconds=limit_seconds,
    )
    return ByHostTransfer(near, PeerCopyTransfer(sources, device), far) if near else far


def _peers(weights: dict[int, LayerWeights], members: Members, device: torch.device) -> tuple[frozenset[int], Any]:
    handles: dict[int, Any] = {}
    sources: dict[int, Any] = {members.rank: weights}
    failure = ""
    try:
        others = [r for r in members.on_this_host if r != members.rank]
        handles = {members.global_rank[r]: export_handles(weights) for r in others}
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, handles, group=members.group)
    try:
        for rank in members.on_this_host - {members.rank}:
            sources[rank] = open_handles(everyones[members.global_rank[rank]][dist.get_rank()], device)
    except Exception as error:
        failure = failure or f"{type(error).__name__}: {error}"
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure, group=members.group)
    failures = [failures[members.global_rank[rank]] for rank in members.on_this_host]
    if any(failures):
        logger.warning(
            "[eplb-affinity] no peer copies on this host (%s); experts go through host memory", max(failures)
        )
        return frozenset(), {members.rank: weights}
    return members.on_this_host, sources
