"""Time of one dispatch or combine from the bytes on each link, with constants fitted to DeepEP measurements.

    t = base + fill * bytes of a copy / NVLink rate + per_peer * NVLink peers + (rdma_base if RDMA is used)
        + (copies ** 4 + nvlink ** 4 + channels ** 4 + wire ** 4 + rdma ** 4 + rows ** 4) ** (1/4)

    copies = tokens * per_token + copies * per_copy         work of the kernels for each token and copy of any size
    nvlink = source bytes / source rate + bytes of copies / rate                     what the kernels' SMs move
    channels = (copies to the busiest GPU beyond its buffers) * (bytes / rate + per_copy)
    wire   = bytes over NVLink / rate                                                what the link carries
    rdma   = bytes over RDMA / rate
    rows   = per_row * the most experts of one token on one GPU   DeepEP V2's combine adds them up one after another

where copies and bytes are those of the busiest GPU (and NIC) of the batch. They overlap: the slowest decides, and
the fourth-power sum adds a little where two are near. Channels: DeepEP deals its SMs out evenly to destinations (in
low-latency mode to experts), so those that serve an idle one do not help a busy one; a buffer for each destination
takes the first copies. Fitted by :mod:`.calibrate`; constants in
``data/calibrations.yaml``; the comparison with every source is in docs/capacity_planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.content import parse_yaml
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.simulate.traffic import (
    LATENCY_LOCAL,
    LATENCY_NVLINK_IN,
    LATENCY_NVLINK_OUT,
    LATENCY_RDMA_IN,
    LATENCY_RDMA_OUT,
    NORMAL_FORWARDED,
    NORMAL_LOCAL,
    NORMAL_NVLINK_OUT,
    NORMAL_RDMA_IN,
    NORMAL_RDMA_OUT,
    NORMAL_RECEIVED,
)

OVERLAP_POWER = 4.0


@dataclass(frozen=True)
class PhaseConstants:
    """Constants of one phase in one mode. Rates in GB/s for each GPU at the calibration's nominal links; 0: unused.

    ``fill_tokens``: the pipeline must fill before it flows: so many tokens' worth of bytes are latency.
    ``local_share``: what a copy that stays on its GPU costs, relative to one that travels; ``channel_local_share`` the
    same for the channels. ``channel_buffer_copies``: for each destination. Without channel constants NVLink takes as
    long as the busiest GPU receives or sends. ``engine_us``: what an engine pays beside the kernel: normal mode's
    layout kernel and its wait for the received counts on the CPU.
    """

    base_us: float
    nvlink_gb_per_s: float
    rdma_gb_per_s: float = 0.0
    rdma_base_us: float = 0.0
    per_peer_us: float = 0.0
    source_gb_per_s: float = 0.0
    fill_tokens: float = 0.0
    per_token_ns: float = 0.0
    wire_gb_per_s: float = 0.0
    per_copy_ns: float = 0.0
    local_share: float = 1.0
    channel_gb_per_s: float = 0.0
    channel_copy_ns: float = 0.0
    channel_buffer_copies: float = 0.0
    channel_local_share: float = 1.0
    engine_us: float = 0.0
    per_row_us: float = 0.0

    @property
    def has_channels(self) -> bool:
        return bool(self.channel_gb_per_s or self.channel_copy_ns)

    def channels_us(self, load: LinkBytes, nvlink_scale: float) -> float:
        """Of the busiest destination."""
        if not self.has_channels or not load.tokens:
            return 0.0
        ns_of_bytes = (
            load.source / load.tokens / (self.channel_gb_per_s * nvlink_scale) if self.channel_gb_per_s else 0.0
        )
        copies = max(0.0, load.received - self.channel_buffer_copies * (load.peers + 1))
        return copies * (ns_of_bytes + self.channel_copy_ns) / 1e3


@dataclass(frozen=True)
class Calibration:
    """All phases of one kind of hardware; ``phases`` by "mode.phase", such as "normal.dispatch"."""

    name: str
    nvlink_gb_per_s: float
    rdma_gb_per_s: float
    sources: tuple[str, ...]
    phases: dict[str, PhaseConstants]


@dataclass(frozen=True)
class LinkBytes:
    """Bytes of the busiest GPU and NIC in one phase, and who they are. -1: nobody (the link is not used).

    ``tokens`` are those of each GPU, ``copies`` those of the busiest one; ``received`` the copies that arrive at the
    busiest; ``wire`` the bytes that really cross NVLink, into or out of one GPU; ``most_rows`` the most experts of one
    token on one GPU.
    """

    nvlink: float
    rdma: float
    source: float
    peers: int
    tokens: float = 0.0
    copies: float = 0.0
    wire: float = 0.0
    received: float = 0.0
    most_rows: float = 0.0
    nvlink_gpu: int = -1
    nvlink_direction: str = ""
    rdma_gpu: int = -1
    rdma_direction: str = ""


@dataclass(frozen=True)
class PhaseTime:
    us: float
    slowest_link: str


def phase_time(
    constants: PhaseConstants, load: LinkBytes, nvlink_scale: float = 1.0, rdma_scale: float = 1.0
) -> PhaseTime:
    """Predicted time; the scales are the system's links over the calibration's nominal ones."""
    nvlink = load.nvlink / (constants.nvlink_gb_per_s * nvlink_scale * 1e3)
    if constants.source_gb_per_s:
        nvlink += load.source / (constants.source_gb_per_s * 1e3)
    copies = (load.tokens * constants.per_token_ns + load.copies * constants.per_copy_ns) / 1e3
    wire = load.wire / (constants.wire_gb_per_s * nvlink_scale * 1e3) if constants.wire_gb_per_s else 0.0
    rdma = 0.0
    us = constants.base_us + constants.per_peer_us * load.peers
    if load.rdma:
        if not constants.rdma_gb_per_s or not rdma_scale:
            raise InputError("cluster.rdma_gb_per_s is 0, or its calibration has no RDMA, but there are several nodes")
        rdma = load.rdma / (constants.rdma_gb_per_s * rdma_scale * 1e3)
        us += constants.rdma_base_us
    if load.tokens:
        size = load.source / load.tokens
        us += constants.fill_tokens * size / (constants.nvlink_gb_per_s * nvlink_scale * 1e3)
    channels = constants.channels_us(load, nvlink_scale)
    rows = constants.per_row_us * load.most_rows
    terms = (copies, nvlink, channels, wire, rdma, rows)
    transfer = sum(term**OVERLAP_POWER for term in terms) ** (1 / OVERLAP_POWER)
    if transfer < us or rows >= max(terms):
        slowest = "latency"
    elif rdma > max(nvlink, channels, wire, copies):
        slowest = f"RDMA {load.rdma_direction} GPU {load.rdma_gpu}"
    else:
        which = "NVLink" if max(nvlink, channels, wire) > copies else "copies"
        slowest = f"{which} {load.nvlink_direction} GPU {load.nvlink_gpu}"
    return PhaseTime(us + transfer, slowest)


def link_bytes(
    counters: np.ndarray, mode: str, phase: str, bytes_per_copy: float, tokens_per_gpu: float, peers: int,
    constants: PhaseConstants | None = None, most_rows: int = 0,
) -> LinkBytes:  # fmt: skip
    """Bytes of the busiest links from ``counters`` [NUM_COUNTERS, gpus]; combine sends dispatch's copies back."""
    constants = constants or PhaseConstants(0.0, 0.0)
    local, of_channels = constants.local_share, constants.channel_local_share
    joins = mode != "low_latency"  # one copy for each destination, not for each expert
    if joins:
        received = counters[NORMAL_RECEIVED] - (1 - of_channels) * counters[NORMAL_LOCAL]
        stay = (1 - local) * counters[NORMAL_LOCAL]
        inward, outward = counters[NORMAL_RECEIVED] - stay, counters[NORMAL_FORWARDED] - stay
        rdma_out, rdma_in = counters[NORMAL_RDMA_OUT], counters[NORMAL_RDMA_IN]
    else:
        received = counters[LATENCY_NVLINK_IN] - (1 - of_channels) * counters[LATENCY_LOCAL]
        stay = (1 - local) * counters[LATENCY_LOCAL]
        inward, outward = counters[LATENCY_NVLINK_IN] - stay, counters[LATENCY_NVLINK_OUT] - stay
        rdma_out, rdma_in = counters[LATENCY_RDMA_OUT], counters[LATENCY_RDMA_IN]
    names = ("into", "out of") if phase == "dispatch" else ("out of", "into")
    nvlink, nvlink_gpu, nvlink_direction = _busiest(inward, outward, names)
    wire = 0.0
    if joins:
        if constants.has_channels:
            nvlink = float(outward.max())
        travel = counters[NORMAL_RECEIVED] - counters[NORMAL_LOCAL]
        wire = float(max(travel.max(), counters[NORMAL_NVLINK_OUT].max())) * bytes_per_copy
    rdma, rdma_gpu, rdma_direction = _busiest(rdma_in, rdma_out, names)
    return LinkBytes(
        nvlink * bytes_per_copy, rdma * bytes_per_copy, tokens_per_gpu * bytes_per_copy, peers, tokens_per_gpu, nvlink,
        wire, float(received.max()), float(most_rows), nvlink_gpu, nvlink_direction, rdma_gpu, rdma_direction,
    )  # fmt: skip


def _busiest(inward: np.ndarray, outward: np.ndarray, names: tuple[str, str]) -> tuple[float, int, str]:
    into, out = int(inward.argmax()), int(outward.argmax())
    if inward[into] >= outward[out]:
        return float(inward[into]), into, names[0]
    return float(outward[out]), out, names[1]


@lru_cache(maxsize=1)
def _all() -> dict[str, Any]:
    text = (resources.files("sglang_eplb_affinity.simulate") / "data" / "calibrations.yaml").read_text()
    return dict(parse_yaml(text, "calibrations.yaml"))


def load_calibration(name: str) -> Calibration:
    data = _all()
    if name not in data:
        raise InputError(f"cluster.calibration: {name!r} is not one of {', '.join(sorted(data))}")
    entry = data[name]
    phases = {key: PhaseConstants(**values) for key, values in entry["phases"].items()}
    return Calibration(name, entry["nvlink_gb_per_s"], entry["rdma_gb_per_s"], tuple(entry["sources"]), phases)
