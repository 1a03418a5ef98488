"""--eplb-async inside a rank of SGLang: makes the rebalancer once the weights are loaded."""

from __future__ import annotations

import atexit
import logging
import os
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.rebalance import verify
from sglang_eplb_affinity.rebalance.agreement import GlooAgreement
from sglang_eplb_affinity.rebalance.commit import LayerCommitter
from sglang_eplb_affinity.rebalance.expert_tensors import ExpertModule, expert_modules
from sglang_eplb_affinity.rebalance.map_tables import MapTables
from sglang_eplb_affinity.rebalance.paths import Members, make_transfer
from sglang_eplb_affinity.rebalance.planner_client import PlannerProcess
from sglang_eplb_affinity.rebalance.rebalancer import AsyncRebalancer, Parts
from sglang_eplb_affinity.rebalance.round_record import report
from sglang_eplb_affinity.rebalance.watchdog import Watchdog
from sglang_eplb_affinity.rebalance.weights import LayerWeights, StagingBuffer, staging_row_bytes
from sglang_eplb_affinity.rebalance.window_exchange import WindowExchange, WindowShape
from sglang_eplb_affinity.sglang_hooks import process
from sglang_eplb_affinity.sglang_hooks.rounds import plan_settings, staging_rows
from sglang_eplb_affinity.sglang_hooks.settings import Settings
from sglang_eplb_affinity.sglang_hooks.window_snapshot import RecorderWindow

logger = logging.getLogger(__name__)

# Longer than any phase limit: a group that timed out cannot be used again.
_GROUP_TIMEOUT = timedelta(hours=12)


def start(model_runner: Any, settings: Settings) -> AsyncRebalancer:
    """A collective call of all ranks, with the weights loaded and the KV cache not yet sized."""
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    metadata = get_global_expert_location_metadata()
    config, device = settings.asynchronous, _device_of(settings, model_runner)
    assert config is not None  # --eplb-async
    world, world_rank = dist.get_world_size(), dist.get_rank()
    rank, num_ranks = parallel.moe_ep_rank, parallel.moe_ep_size
    agree, plan, move = (dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT) for _ in range(3))
    members = Members(agree, rank, (parallel.moe_tp_rank, parallel.moe_dp_rank))

    local_slots = metadata.num_physical_experts // num_ranks
    weights = {
        layer: LayerWeights.of(layer, partial(_tensors, found), local_slots)
        for layer, found in sorted(expert_modules(model_runner.model).items())
    }
    rows, row_bytes = staging_rows(settings, local_slots), staging_row_bytes(weights)
    staging = tuple(StagingBuffer(rows, row_bytes, device) for _ in range(config.layers_in_flight))
    transfer = make_transfer(weights, members, move, device, rows, row_bytes, config.phase_limit_seconds)

    affinity = get_global_expert_distribution_recorder()._affinity
    shape = WindowShape(
        metadata.num_layers, metadata.num_logical_experts, affinity.top_k, settings.recording.sample_tokens
    )
    window = RecorderWindow(affinity.own_recorder, affinity.reset, shape, device, seed=world_rank)
    plans = plan_settings(settings, rows, model_runner.model_config)
    planner = PlannerProcess(plans, config.phase_limit_seconds) if world_rank == 0 else None
    if planner is not None:
        atexit.register(planner.close)
    history = None if process.loaded_map is None else process.loaded_map.history
    exchange = WindowExchange(shape, plans, planner, plan, world_rank, world, history)

    current = ExpertMap(metadata.physical_to_logical_map_cpu.numpy().astype(np.int32), metadata.num_logical_experts)
    verifier = None
    if os.environ.get(verify.ENVIRONMENT) == "1":
        verifier = verify.WeightVerifier(weights, current, rank, num_ranks, members.replica, agree)
    rebalancer = AsyncRebalancer(
        config,
        Parts(
            window=window,
            plan=exchange.plan,
            transfer=transfer,
            committer=LayerCommitter(weights, _tables(metadata, rank), device),
            staging=staging,
            agreement=GlooAgreement(agree),
            bytes_per_expert={layer: of_layer.bytes_per_expert for layer, of_layer in weights.items()},
            report=partial(report, observers=process.observers) if world_rank == 0 else None,
            verify=verifier.check if verifier is not None else None,
        ),
        current,
        algorithm=settings.algorithm,
        rank=rank,
        num_ranks=num_ranks,
        planned=settings.loads_map,
        prepare=partial(torch.cuda.set_device, device) if device.type == "cuda" else None,
    )
    Watchdog(rebalancer, min(1.0, config.phase_limit_seconds / 4))
    logger.info(
        "[eplb-affinity] --eplb-async: %d layers of %d x %.2f MB experts on this rank, %d in flight; "
        "staging %.1f MB and snapshot %.1f MB on %s, allocated before the KV cache; %s",
        len(weights), local_slots, max((w.bytes_per_expert for w in weights.values()), default=0) / 1e6,
        config.layers_in_flight, sum(buffer.nbytes for buffer in staging) / 1e6, window.nbytes / 1e6, device,
        f"experts travel by {type(transfer).__name__}",
    )  # fmt: skip
    return rebalancer


def _tensors(found: ExpertModule) -> list[torch.Tensor]:
    return list(found.tensors().values())


def _tables(metadata: Any, rank: int) -> MapTables:
    return MapTables(
        metadata.physical_to_logical_map,
        metadata.logical_to_all_physical_map,
        metadata.logical_to_all_physical_map_num_valid,
        metadata.logical_to_rank_dispatch_physical_map,
        metadata.physical_to_logical_map_cpu,
        metadata.logical_to_all_physical_map_cpu,
        rank,
    )


def _device_of(settings: Settings, model_runner: Any) -> torch.device:
    if settings.device == "cuda":
        return torch.device("cuda", model_runner.gpu_id)
    if settings.device == "cpu":
        return torch.device("cpu")
    raise InputError(f"--device {settings.device}: --eplb-async works on cuda and cpu")
