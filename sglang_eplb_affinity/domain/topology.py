"""Where GPUs and physical experts (slots) sit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError


@dataclass(frozen=True)
class Topology:
    """GPUs of one expert-parallel group, numbered node by node, as SGLang numbers its ranks."""

    num_gpus: int
    num_nodes: int = 1

    def __post_init__(self) -> None:
        if self.num_gpus < 1 or self.num_nodes < 1:
            raise InputError(
                f"topology: num_gpus={self.num_gpus} and num_nodes={self.num_nodes}, but both must be at least 1"
            )
        if self.num_gpus % self.num_nodes:
            raise InputError(
                f"topology: num_gpus={self.num_gpus} does not divide evenly over num_nodes={self.num_nodes}"
            )

    @property
    def gpus_per_node(self) -> int:
        return self.num_gpus // self.num_nodes

    def slots_per_gpu(self, num_slots: int) -> int:
        """Slots (physical experts) on each GPU; raises InputError unless they divide evenly."""
        if num_slots < self.num_gpus or num_slots % self.num_gpus:
            raise InputError(
                f"{num_slots} physical experts (logical + redundant) do not divide evenly over {self.num_gpus} GPUs; "
                f"choose the number of redundant experts so that the sum is a multiple of {self.num_gpus}"
            )
        return num_slots // self.num_gpus

    def gpu_of_slot(self, num_slots: int) -> np.ndarray:
        """int32 [num_slots]: the GPU that holds each slot (SGLang: slot // slots per GPU)."""
        return np.arange(num_slots, dtype=np.int32) // self.slots_per_gpu(num_slots)

    def node_of_gpu(self) -> np.ndarray:
        """int32 [num_gpus]: the node of each GPU."""
        return np.arange(self.num_gpus, dtype=np.int32) // self.gpus_per_node
