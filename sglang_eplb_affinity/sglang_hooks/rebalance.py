"""One rebalance of SGLang's EPLB manager: plan with affinity, and say what changed.

Rank 0 plans and broadcasts the map, so that all ranks agree even if they were given different planners. Any failure
to plan keeps the map that is in force. One line per rebalance is logged on rank 0, for every EPLB algorithm as long
as the affinity recorder is on.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from sglang_eplb_affinity.dispatch.evaluate import moved_experts
from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, plan, warm_up
from sglang_eplb_affinity.planner.config import Objective, usable_cores
from sglang_eplb_affinity.rebalance.layer_moves import static_choice
from sglang_eplb_affinity.rebalance.round_record import Result, RoundObserver, RoundRecord, report, routing_checksum
from sglang_eplb_affinity.sglang_hooks import ALGORITHM
from sglang_eplb_affinity.sglang_hooks.adapter import adapter

if TYPE_CHECKING:
    from sglang_eplb_affinity.sglang_hooks.recording import RecordedWindow

logger = logging.getLogger(__name__)

observers: list[RoundObserver] = []
"""Told on rank 0 after every round."""


def dispatch_rule(server_args: Any) -> DispatchRule:
    """The rule that the server picks replicas by, as the planner knows it."""
    given = server_args.ep_dispatch_algorithm
    return next((rule for rule in DISPATCH_RULES if rule == given), "dynamic")


def num_groups_of(model_config: Any) -> int | None:
    """Expert groups of group-limited routing (``n_group`` of DeepSeek-V3's config), or None."""
    return getattr(getattr(model_config, "hf_config", None), "n_group", None) or None


def planner_config(server_args: Any, *, first: bool = True, num_groups: int | None = None) -> PlannerConfig:
    """The planner's settings that follow from the server's flags; ``first``: no planned map is in force yet.

    DeepEP's auto mode sends prefill tokens once per destination and decode tokens once per expert, so there the
    objective weighs the two by the window's share of prefill.
    """
    mode = server_args.deepep_mode if server_args.moe_a2a_backend == "deepep" else "normal"
    objectives: dict[str, Objective] = {"auto": "mixed", "low_latency": "low_latency"}
    return PlannerConfig(
        objective=objectives.get(mode, "normal"),
        max_load_increase=server_args.eplb_affinity_max_load_increase,
        effort="fast",
        dispatch=dispatch_rule(server_args),
        incremental=server_args.eplb_affinity_incremental and not first,
        warm_start=not first,
        max_moves=None if first else server_args.eplb_affinity_max_moves,
        minimum_gain=server_args.eplb_min_gain or None,
        num_groups=num_groups,
    )


def threads_while_stopped() -> int:
    """Worker threads of a synchronous round: half of this process's cores, since all ranks wait for it (one each)."""
    return max(1, usable_cores() // 2)


def topology_of(server_args: Any, ep_size: int) -> Topology:
    return Topology(ep_size, server_args.eplb_affinity_nodes or server_args.nnodes)


def warm_up_planner(server_args: Any) -> None:
    """Compile or load kernels before the server is ready, not at the first rebalance: the planner's on rank 0, on all
    ranks that of the static dispatch table."""
    if server_args.eplb_algorithm != ALGORITHM or not server_args.enable_eplb or server_args.eplb_async:
        return  # with --eplb-async the planner process warms up by itself, and fills the tables
    try:
        if dispatch_rule(server_args) == "static":
            static_choice(np.zeros((1, 1), np.int32), Topology(1), 1)
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        logger.info("[eplb-affinity] planner ready after %.1f s", warm_up(planner_config(server_args)))
    except Exception:  # the first rebalance will say it again and keep the map in force
        logger.exception("[eplb-affinity] planner could not be warmed up")


def begin(manager: Any, recorded: RecordedWindow | None) -> RebalanceRound | None:
    return None if recorded is None else RebalanceRound(manager, recorded.window)


class RebalanceRound:
    """From the recorded window to the log line."""

    def __init__(self, manager: Any, window: RoutingWindow) -> None:
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

        self._manager = manager
        self._server_args = adapter().arguments()
        self._num_groups = num_groups_of(getattr(manager, "_model_config", None))
        self._window = window
        self._started = time.perf_counter()
        self._phase_seconds: dict[str, float] = {}
        self._planned_at = self._started
        metadata = get_global_expert_location_metadata()
        self._metadata = metadata
        self._before = map_of(metadata)
        self._topology = topology_of(self._server_args, metadata.ep_size)
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        manager._eplb_affinity_rounds = getattr(manager, "_eplb_affinity_rounds", 0) + 1
        self._number = manager._eplb_affinity_rounds

    @property
    def plans(self) -> bool:
        """Whether the algorithm is ours; otherwise this round only observes."""
        return bool(self._server_args.eplb_algorithm == ALGORITHM)

    def plan(self) -> Any | None:
        """New ExpertLocationMetadata, None to keep the map in force (nothing recorded, no gain, or a failure)."""
        if not self._window.counts.any():
            # The window is the same on all ranks, so all of them return here.
            self._log("skipped", self._before, reason="no tokens recorded")
            return None
        started = time.perf_counter()
        planned, failure = self._plan_on_rank_0()
        self._planned_at = time.perf_counter()
        self._phase_seconds["plan"] = self._planned_at - started
        if planned is None:
            self._log("failed", self._before, reason=failure)
            return None
        if np.array_equal(planned.physical_to_logical, self._before.physical_to_logical):
            least = self._server_args.eplb_min_gain
            self._log("unchanged", self._before, reason=f"no layer gains {least:.2%}" if least else None)
            return None
        return self._metadata_of(planned)

    def finish(self, metadata: Any) -> None:
        """The new map is in force on this rank."""
        self._phase_seconds["move"] = time.perf_counter() - self._planned_at
        # SGLang's algorithms place dense layers too, but only layers with experts move.
        layers = sorted(self._manager._get_model().routed_experts_weights_of_layer.keys())
        ids = self._before.physical_to_logical.copy()
        ids[layers] = map_of(metadata).physical_to_logical[layers]
        self._log("applied", ExpertMap(ids, self._before.num_experts))

    def _plan_on_rank_0(self) -> tuple[ExpertMap | None, str]:
        before = self._before
        device = self._metadata.physical_to_logical_map.device
        message = torch.zeros(before.physical_to_logical.size + 1, dtype=torch.int64)
        failure = "rank 0 could not plan; its log says why"
        if self._rank == 0:
            try:
                first = self._number == 1 and self._server_args.init_expert_location == "trivial"
                config = planner_config(self._server_args, first=first, num_groups=self._num_groups)
                config = dataclasses.replace(config, threads=threads_while_stopped())
                planned = plan(self._window, self._topology, before.num_slots, config, before).expert_map
                message[0] = 1
                message[1:] = torch.from_numpy(planned.physical_to_logical.astype(np.int64).ravel())
            except Exception as error:  # whatever goes wrong, the server goes on with the map it has
                failure = f"{type(error).__name__}: {error}"
                if not isinstance(error, InputError):
                    logger.exception("[eplb-affinity] planning failed; the map in force stays")
        if dist.is_initialized():
            on_device = message.to(device)
            dist.broadcast(on_device, src=0)
            message = on_device.cpu()
        if not message[0]:
            return None, failure
        ids = message[1:].numpy().reshape(before.physical_to_logical.shape)
        return ExpertMap(ids, before.num_experts), ""

    def _metadata_of(self, expert_map: ExpertMap) -> Any:
        rule, device = dispatch_rule(self._server_args), self._metadata.physical_to_logical_map.device
        return metadata_of(expert_map, self._topology, rule, device)

    def _log(self, result: Result, after: ExpertMap, reason: str | None = None) -> None:
        if self._rank:
            return
        try:
            record = self._record(result, after, reason)
        except Exception:  # figures must not stop the server
            logger.exception("[eplb-affinity] rebalance %s, but its figures could not be computed", result)
            return
        report(record, after, observers)

    def _record(self, result: Result, after: ExpertMap, reason: str | None) -> RoundRecord:
        moved = moved_experts(self._before, after, self._topology)
        changed = np.flatnonzero((self._before.physical_to_logical != after.physical_to_logical).any(1))
        rule, threads = dispatch_rule(self._server_args), threads_while_stopped()
        return RoundRecord(
            result=result,
            algorithm=self._server_args.eplb_algorithm,
            round=self._number,
            tokens=int(self._window.counts.sum(1).max()),
            moved_experts=int(moved.sum()),
            moved_bytes=self._bytes_of(moved),
            committed_layers=tuple(changed.tolist()),
            contiguous=MapFigures.of(self._window, contiguous_like(after), self._topology, rule, threads),
            before=MapFigures.of(self._window, self._before, self._topology, rule, threads),
            after=MapFigures.of(self._window, after, self._topology, rule, threads),
            phase_seconds=self._phase_seconds,
            seconds=time.perf_counter() - self._started,
            reason=reason,
            routing_checksum=routing_checksum(self._window),
        )

    def _bytes_of(self, moved: np.ndarray) -> int:
        """Weights of ``moved`` [layers] experts, over all ranks."""
        if not moved.any():
            return 0
        sizes = expert_bytes(self._manager._get_model().routed_experts_weights_of_layer)
        return sum(int(count) * sizes[layer] for layer, count in enumerate(moved) if count)


def expert_bytes(weights_of_layer: Any) -> dict[int, int]:
    """Bytes of one expert's weights by layer; ``weights_of_layer`` is SGLang's {layer: [tensor [local slots, ...]]}."""
    return {
        layer: sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
        for layer, tensors in weights_of_layer.items()
    }


def contiguous_like(expert_map: ExpertMap) -> ExpertMap:
    return ExpertMap.contiguous(expert_map.num_layers, expert_map.num_experts, expert_map.num_slots)


def metadata_of(
    expert_map: ExpertMap, topology: Topology, rule: DispatchRule, device: Any, ep_rank: int | None = None
) -> Any:
    """SGLang's ExpertLocationMetadata with all replicas of each expert.

    ``ep_rank`` None: the global rank modulo EP size, as SGLang's own rebalance has it. Under ``static`` the replica
    that this rank uses is the one that the planner counted with. SGLang's own table is another draw, knows no emulated
    nodes, and is filled by a Python loop over ranks, layers and experts while every rank waits.
    """
    from sglang.srt.eplb.expert_location import ExpertLocationMetadata

    slots = torch.from_numpy(expert_map.physical_to_logical.astype(np.int64))
    table = expert_map.logical_to_all_physical()
    padded = np.full((*table.shape[:2], expert_map.num_slots), -1, np.int64)
    padded[:, :, : table.shape[2]] = table
    replicas = torch.from_numpy(padded)
    static = None
    if rule == "static":
        rank = dist.get_rank() % topology.num_gpus if ep_rank is None else ep_rank
        of_layers = [static_choice(layer, topology, expert_map.num_slots)[rank] for layer in table]
        static = torch.from_numpy(np.stack(of_layers).astype(np.int64)).to(device)
    return ExpertLocationMetadata(
        physical_to_logical_map=slots.to(device),
        physical_to_logical_map_cpu=slots,
        logical_to_all_physical_map=replicas.to(device),
        logical_to_all_physical_map_cpu=replicas,
        logical_to_all_physical_map_num_valid=torch.from_numpy((table >= 0).sum(2)).to(device),
        ep_size=topology.num_gpus,
        logical_to_rank_dispatch_physical_map=static,
    )


def map_of(metadata: Any) -> ExpertMap:
    return ExpertMap(metadata.physical_to_logical_map_cpu.numpy().astype(np.int32), metadata.num_logical_experts)
