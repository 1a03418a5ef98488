"""Utilisation of this machine's GPUs, where nvidia-ml-py sees any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """``utilization``: percent of the last sample period that a kernel ran (NVML's), None where it cannot be read."""

    index: int
    name: str
    utilization: int | None

    def to_json(self) -> dict[str, Any]:
        return {"index": self.index, "name": self.name, "utilization_percent": self.utilization}


def read_gpus() -> list[Gpu]:
    """Empty without nvidia-ml-py, a driver or a GPU."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml: Any, index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name = pynvml.nvmlDeviceGetName(handle)
    try:
        utilization = int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except pynvml.NVMLError:  # as with MIG
        utilization = None
    return Gpu(index, name.decode() if isinstance(name, bytes) else str(name), utilization)
