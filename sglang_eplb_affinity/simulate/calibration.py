"""Time of one dispatch or combine from the bytes on each link, with constants fitted to DeepEP measurements.

    t = base + per_peer * NVLink peers + (rdma_base if RDMA is used) + source bytes / source rate
        + ((bytes over NVLink / rate) ** 4 + (bytes over RDMA / rate) ** 4) ** (1/4)

where the bytes are those of the busiest GPU (and NIC) of the batch. NVLink and RDMA overlap: the slower one decides,
and the fourth-power sum adds a little where both are near. Fitted by :mod:`.calibrate`; constants in
``data/calibrations.yaml``; the comparison with every source is in docs/capacity_planning.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
import yaml

from sglang_eplb_affinity.errors import InputError
from sglang_eplb_affinity.simulate.traffic import (
    LATENCY_NVLINK_IN,
    LATENCY_NVLINK_OUT,
    LATENCY_RDMA_IN,
    LATENCY_RDMA_OUT,
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

    ``local_share``: what a copy that stays on its GPU costs, relative to one that travels. ``engine_us``: what an
    engine pays beside the kernel: normal mode's layout kernel and its wait for the received counts on the CPU.
    """

    base_us: float
    nvlink_gb_per_s: float
    rdma_gb_per_s: float = 0.0
    rdma_base_us: float = 0.0
    per_peer_us: float = 0.0
    source_gb_per_s: float = 0.0
    local_share: float = 1.0
    engine_us: float = 0.0


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
    """Bytes of the busiest GPU and NIC in one phase, and who they are. -1: nobody (the link is not used)."""

    nvlink: float
    rdma: float
    source: float
    peers: int
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
    rdma = 0.0
    if load.rdma:
        if not constants.rdma_gb_per_s or not rdma_scale:
            raise InputError("cluster.rdma_gb_per_s is 0, or its calibration has no RDMA, but there are several nodes")
        rdma = load.rdma / (constants.rdma_gb_per_s * rdma_scale * 1e3)
    us = constants.base_us + constants.per_peer_us * load.peers
    if load.rdma:
        us += constants.rdma_base_us
    if constants.source_gb_per_s:
        us += load.source / (constants.source_gb_per_s * 1e3)
    transfer = (nvlink**OVERLAP_POWER + rdma**OVERLAP_POWER) ** (1 / OVERLAP_POWER)
    if transfer < us:
        slowest = "latency"
    elif rdma > nvlink:
        slowest = f"RDMA {load.rdma_direction} GPU {load.rdma_gpu}"
    else:
        slowest = f"NVLink {load.nvlink_direction} GPU {load.nvlink_gpu}"
    return PhaseTime(us + transfer, slowest)


def link_bytes(
    counters: np.ndarray, mode: str, phase: str, bytes_per_copy: float, tokens_per_gpu: float, peers: int, local: float
) -> LinkBytes:
    """Bytes of the busiest links from ``counters`` [NUM_COUNTERS, gpus]; combine sends dispatch's copies back."""
    if mode == "normal":
        received = counters[NORMAL_RECEIVED] - (1 - local) * counters[NORMAL_LOCAL]
        inward, outward = received, counters[NORMAL_NVLINK_OUT]
        rdma_out, rdma_in = counters[NORMAL_RDMA_OUT], counters[NORMAL_RDMA_IN]
    else:
        inward, outward = counters[LATENCY_NVLINK_IN], counters[LATENCY_NVLINK_OUT]
        rdma_out, rdma_in = counters[LATENCY_RDMA_OUT], counters[LATENCY_RDMA_IN]
    names = ("into", "out of") if phase == "dispatch" else ("out of", "into")
    nvlink, nvlink_gpu, nvlink_direction = _busiest(inward, outward, names)
    rdma, rdma_gpu, rdma_direction = _busiest(rdma_in, rdma_out, names)
    return LinkBytes(
        nvlink * bytes_per_copy, rdma * bytes_per_copy, tokens_per_gpu * bytes_per_copy, peers,
        nvlink_gpu, nvlink_direction, rdma_gpu, rdma_direction,
    )  # fmt: skip


def _busiest(inward: np.ndarray, outward: np.ndarray, names: tuple[str, str]) -> tuple[float, int, str]:
    into, out = int(inward.argmax()), int(outward.argmax())
    if inward[into] >= outward[out]:
        return float(inward[into]), into, names[0]
    return float(outward[out]), out, names[1]


@lru_cache(maxsize=1)
def _all() -> dict[str, Any]:
    text = (resources.files("sglang_eplb_affinity.simulate") / "data" / "calibrations.yaml").read_text()
    return dict(yaml.safe_load(text))


def load_calibration(name: str) -> Calibration:
    data = _all()
    if name not in data:
        raise InputError(f"cluster.calibration: {name!r} is not one of {', '.join(sorted(data))}")
    entry = data[name]
    phases = {key: PhaseConstants(**values) for key, values in entry["phases"].items()}
    return Calibration(name, entry["nvlink_gb_per_s"], entry["rdma_gb_per_s"], tuple(entry["sources"]), phases)
