"""Time of one layer and one step, from a batch's traffic and the system's rates.

Experts: :mod:`.expert_time`. Attention follows a roofline: reading weights and KV cache against multiplying, joined by
a fourth-power sum. Its achieved shares of the peaks are those of DeepGEMM's published table for H800 (README of its
first release: 1100-1300 of 1979 TFLOPS for grouped FP8 products, 2.0-2.6 of 3.35 TB/s for small ones), an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.simulate.calibration import Calibration, PhaseTime, link_bytes, load_calibration, phase_time
from sglang_eplb_affinity.simulate.expert_time import active_slots, experts_us
from sglang_eplb_affinity.simulate.system import DeepEPMode, System
from sglang_eplb_affinity.simulate.traffic import BatchTraffic

COMPUTE_SHARE = 0.62
ATTENTION_SHARE = 0.5
MEMORY_SHARE = 0.70
ROOFLINE_POWER = 4.0
LAYER_LAUNCH_US = 20.0  # attention, norms, gate: small kernels in a CUDA graph


@dataclass(frozen=True)
class LayerTime:
    """Microseconds of one layer's stages, who is slowest in each, and the most slots of a GPU that have tokens."""

    dispatch_us: float
    experts_us: float
    combine_us: float
    rest_us: float
    dispatch_link: str
    combine_link: str
    experts_gpu: int
    active_slots: int

    @property
    def communication_us(self) -> float:
        return self.dispatch_us + self.combine_us

    @property
    def compute_us(self) -> float:
        return self.experts_us + self.rest_us

    @property
    def total_us(self) -> float:
        return self.communication_us + self.compute_us


class TimeModel:
    """Times for one system; ``mode`` of DeepEP and the phase (prefill or decode) are given with each batch."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.calibration: Calibration = load_calibration(system.cluster.calibration)
        self._nvlink_scale = system.cluster.nvlink_gb_per_s / self.calibration.nvlink_gb_per_s
        self._rdma_scale = system.cluster.rdma_gb_per_s / self.calibration.rdma_gb_per_s

    def layer(self, traffic: BatchTraffic, scale: float, mode: DeepEPMode, prefill: bool, tokens: float) -> LayerTime:
        """One MoE layer; ``tokens`` are those of each GPU, ``scale`` the tokens that each simulated one stands for."""
        model, topology = self.system.model, self.system.topology
        counters = traffic.counters * scale
        peers = topology.gpus_per_node - 1
        times = []
        for phase, size in (("dispatch", model.dispatch_bytes), ("combine", model.combine_bytes)):
            constants = self.calibration.phases[f"{mode}.{phase}"]
            load = link_bytes(counters, mode, phase, size, tokens, peers, constants, traffic.most_rows)
            time = phase_time(constants, load, self._nvlink_scale, self._rdma_scale)
            waits = mode == "normal" or prefill  # DeepEP V2's decode does not wait for counts on the CPU
            times.append(PhaseTime(time.us + constants.engine_us * waits, time.slowest_link))
        slot_load = traffic.slot_load * scale
        experts_us, gpu = self.experts(slot_load, mode, prefill)
        active = int(active_slots(slot_load.reshape(topology.num_gpus, -1)).max())
        return LayerTime(
            times[0].us, experts_us, times[1].us, self.rest_us(tokens, prefill),
            times[0].slowest_link, times[1].slowest_link, gpu, active,
        )  # fmt: skip

    def experts(self, slot_load: np.ndarray, mode: DeepEPMode, prefill: bool) -> tuple[float, int]:
        """(us of the slowest GPU, that GPU) for tokens float64 [slots]."""
        by_gpu = slot_load.reshape(self.system.topology.num_gpus, -1)
        masked = mode != "normal" and not prefill
        us = experts_us(by_gpu, self.system.model, self.system.gpu, masked)
        slowest = int(us.argmax())
        return float(us[slowest]), slowest

    def rest_us(self, tokens: float, prefill: bool) -> float:
        """Attention, shared experts, norms and gate of one layer, for ``tokens`` on each GPU."""
        model, serving = self.system.model, self.system.serving
        shared = model.shared_experts * model.expert_weights
        return self._dense_us(tokens, prefill, model.attention_mparams * 1e6, shared, serving.context_tokens)

    def dense_layer_us(self, tokens: float, prefill: bool) -> float:
        """A layer without experts (data parallel)."""
        model = self.system.model
        feed_forward = 3 * model.hidden * model.dense_intermediate
        return self._dense_us(
            tokens, prefill, model.attention_mparams * 1e6, feed_forward, self.system.serving.context_tokens
        )

    def _dense_us(self, tokens: float, prefill: bool, attention: float, feed_forward: float, context: int) -> float:
        model, gpu = self.system.model, self.system.gpu
        weights = attention * model.attention_bytes_per_weight + feed_forward * model.expert_bytes_per_weight
        flops_us = tokens * 2 * attention / (_attention_tflops(self.system) * COMPUTE_SHARE * 1e6)
        flops_us += tokens * 2 * feed_forward / (gpu.expert_tflops * COMPUTE_SHARE * 1e6)
        read_us = weights / (gpu.hbm_gb_per_s * MEMORY_SHARE * 1e3)
        if prefill:
            pairs = tokens * self.system.serving.prompt_tokens / 2 * model.prefill_flops_per_pair
            cache = 0.0
        else:
            pairs = tokens * context * model.decode_flops_per_pair
            cache = tokens * context * model.kv_bytes_per_token
        pairs_us = pairs / (gpu.bf16_tflops * ATTENTION_SHARE * 1e6)
        cache_us = cache / (gpu.hbm_gb_per_s * MEMORY_SHARE * 1e3)
        return float(_roofline(read_us, flops_us) + _roofline(cache_us, pairs_us)) + LAYER_LAUNCH_US

    def step_ms(self, layers: list[LayerTime], half: list[LayerTime] | None, prefill: bool, tokens: float) -> float:
        """One forward pass: the simulated layers stand for all MoE layers.

        ``half``: the same layers with half of the batch, for two-batch overlap: while one half communicates the other
        computes, so a layer takes twice the longer of the two.
        """
        model = self.system.model
        if half is None:
            layer_us = float(np.mean([layer.total_us for layer in layers]))
        else:
            layer_us = float(np.mean([2 * max(layer.communication_us, layer.compute_us) for layer in half]))
        us = model.moe_layers * layer_us + model.dense_layers * self.dense_layer_us(tokens, prefill)
        return us / 1e3 + self.system.serving.other_ms_per_step


def _roofline(read: np.ndarray | float, multiply: np.ndarray | float) -> np.ndarray:
    return np.asarray((np.power(read, ROOFLINE_POWER) + np.power(multiply, ROOFLINE_POWER)) ** (1 / ROOFLINE_POWER))


def _attention_tflops(system: System) -> float:
    """Attention's projections run in the dtype of their weights."""
    return system.gpu.expert_tflops if system.model.attention_bytes_per_weight <= 1 else system.gpu.bf16_tflops
