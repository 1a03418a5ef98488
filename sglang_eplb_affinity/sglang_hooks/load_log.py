"""Tokens per expert and per GPU in prefill and decode, logged every so many passes (--expert-load-log-passes)."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import torch.distributed as dist

from sglang_eplb_affinity.device.recorder import PHASES, AffinityRecorder
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.rebalance.first_rank import this_rank
from sglang_eplb_affinity.rebalance.window_reduce import Reduction
from sglang_eplb_affinity.sglang_hooks import gone_ranks

logger = logging.getLogger(__name__)


class LoadLog:
    """Counts passes; every ``interval`` of them all ranks sum their counts and the first logs a line per phase."""

    def __init__(self, interval: int, recorder: AffinityRecorder, reduction: Reduction) -> None:
        self._interval, self._recorder, self._reduction = interval, recorder, reduction
        self._passes = 0

    def on_forward_pass_end(self) -> None:
        if not self._interval:
            return
        self._passes += 1
        if self._passes % self._interval:
            return
        counts = self._recorder.take_phase_counts()
        if not self._reduction.contributes:
            counts.zero_()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

        metadata = get_global_expert_location_metadata()
        living = gone_ranks.living_ranks(Topology(metadata.ep_size))
        if this_rank() != (0 if living is None else int(living.ranks[0])):
            return
        try:
            expert_map = gone_ranks.map_in_force(metadata, living, counts.sum(0).cpu().numpy()).expert_map
        except InputError as error:
            logger.warning("[eplb-affinity] no load: %s", error)
            return
        num_gpus = metadata.ep_size if living is None else living.topology.num_gpus
        for phase, of_phase in zip(PHASES, counts.cpu().numpy(), strict=True):
            if of_phase.any():
                record = {"phase": phase, "passes": self._interval, **load_record(of_phase, expert_map, num_gpus)}
                if living is not None:
                    record["gone_ranks"] = living.gone
                logger.info("[eplb-affinity] load %s", json.dumps(record))


def load_record(counts: np.ndarray, expert_map: ExpertMap, num_gpus: int) -> dict[str, Any]:
    """Figures of int64 [layers, experts] token counts; replicas are taken to share their expert's tokens evenly.

    ``expert_tokens`` and ``gpu_tokens`` are sums over layers; max/mean are per layer, as mean and as the worst layer.
    """
    share = counts / expert_map.replica_counts()
    of_slot = np.take_along_axis(share, expert_map.physical_to_logical.astype(np.int64), axis=1)
    of_gpu = of_slot.reshape(len(counts), num_gpus, -1).sum(2)
    used = counts.any(1)

    def max_over_mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(values[used].max(1) / values[used].mean(1))

    expert, gpu = max_over_mean(counts), max_over_mean(of_gpu)
    return {
        "layers": int(used.sum()),
        "expert_max_over_mean": round(float(expert.mean()), 4),
        "expert_max_over_mean_worst": round(float(expert.max()), 4),
        "gpu_max_over_mean": round(float(gpu.mean()), 4),
        "gpu_max_over_mean_worst": round(float(gpu.max()), 4),
        "gpu_tokens": [round(float(value), 1) for value in of_gpu.sum(0)],
        "expert_tokens": counts.sum(0).tolist(),
    }
