"""Rounds of the ranks that live, by SGLang's own state of elastic EP, EPLB manager and weight updater; test_objects.py.

One process plays the ranks in turn, on torch's fake process group. Each round runs twice: first on copies, for what
every rank sends, then with those messages. An expert's weights are its number, and a rank that is gone does nothing.
"""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig

RANKS, LAYERS, EXPERTS, SLOTS = 4, 2, 8, 12
LOCAL = SLOTS // RANKS


@dataclass
class Rank:
    metadata: Any
    weights: dict[int, list[torch.Tensor]]
    from_disk: int = 0


def world(rule: str, own: Any, further: int = 0) -> list[Rank]:
    """As a server starts: SGLang's trivial map."""
    from sglang_eplb_affinity.sglang_hooks.location import metadata_of

    start, topology = ExpertMap.contiguous(LAYERS, EXPERTS, SLOTS), Topology(RANKS)
    held = start.physical_to_logical.reshape(LAYERS, RANKS, LOCAL)
    return [
        Rank(
            metadata_of(start, topology, own, "cpu", rank, further_slots=further),
            {layer: [torch.from_numpy(held[layer, rank].astype(np.float32))] for layer in range(LAYERS)},
        )
        for rank in range(RANKS)
    ]


def some_window(seed: int) -> RoutingWindow:
    tokens = np.random.default_rng(seed).gumbel(size=(LAYERS, 600, EXPERTS)) + np.linspace(0, 2, EXPERTS)
    tokens = np.argsort(-tokens, axis=-1)[..., :2].astype(np.int16)
    return RoutingWindow(np.stack([np.bincount(of.ravel(), minlength=EXPERTS) for of in tokens]), None, tokens)


def empty_window() -> RoutingWindow:
    return RoutingWindow(np.zeros((LAYERS, EXPERTS), np.int64), None, np.full((LAYERS, 16, 2), -1, np.int16))


def round_of(
    ranks: list[Rank], alive: list[int], window: RoutingWindow, algorithm: str, rule: Any, further: int = 0
) -> None:
    """One round in ``ranks``, in place."""
    messages: dict[tuple[int, int], deque[torch.Tensor]] = defaultdict(deque)
    _play(copy.deepcopy(ranks), alive, window, algorithm, rule, messages, deliver=False, further=further)
    _play(ranks, alive, window, algorithm, rule, messages, deliver=True, further=further)


def _play(
    ranks: list[Rank], alive: list[int], window: RoutingWindow, algorithm: str, rule: Any, messages: Any, deliver: bool,
    further: int,
) -> None:  # fmt: skip
    from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager
    from sglang.srt.eplb import eplb_manager
    from sglang.srt.eplb.expert_location import set_global_expert_location_metadata
    from sglang.srt.eplb.expert_location_updater import ExpertLocationUpdater
    from sglang.srt.runtime_context import get_parallel

    from sglang_eplb_affinity.sglang_hooks import process
    from sglang_eplb_affinity.sglang_hooks.sglang_classes import manager_class

    state = ElasticEPStateManager._build_state(ep_size=RANKS, device=torch.device("cpu"))
    state.active_ranks[:] = torch.tensor([int(rank in alive) for rank in range(RANKS)])
    state.sync_active_to_cpu()
    settings = SimpleNamespace(
        topology=Topology(RANKS), ours=algorithm == "affinity", algorithm=algorithm, table_rule=rule, device="cpu",
        planner=PlannerConfig(dispatch=rule, further_slots=further, minimum_gain=0.02, threads=1), loads_map=False,
    )  # fmt: skip
    recorder = SimpleNamespace(
        recording=True,
        last_window=SimpleNamespace(window=window),
        dump_record=lambda output_mode: {
            "logical_count": torch.from_numpy(window.counts)[None], "average_utilization_rate_over_window": None
        },
    )  # fmt: skip
    said: list[torch.Tensor] = []  # on the wire of a broadcast: the first living rank comes first

    def broadcast(tensor: torch.Tensor, src: int) -> None:
        assert src == alive[0], "the root of a broadcast is gone"
        said.append(tensor.clone()) if not said else tensor.copy_(said[0])

    for number in alive:
        rank = ranks[number]

        def exchange(ops: list[Any], number: int = number) -> list[Any]:
            assert all(op.peer in alive for op in ops), "waits for a rank that is gone"
            for op in ops:
                if op.op == dist.isend and not deliver:
                    messages[number, op.peer].append(op.tensor.clone())
                elif op.op == dist.irecv and deliver:
                    op.tensor.copy_(messages[op.peer, number].popleft())
            return []

        def load_missing(
            path: str, load_format: str, weight_name_filter: Any, rank: Rank = rank, n: int = number
        ) -> None:
            for layer, experts in weight_name_filter.items():
                for expert in experts:
                    for slot in rank.metadata.logical_to_all_physical(layer, expert):
                        if slot // LOCAL == n:
                            rank.weights[layer][0][slot % LOCAL] = expert
                            rank.from_disk += 1

        model = SimpleNamespace(
            routed_experts_weights_of_layer=rank.weights, generate_weight_name_filter=lambda missing: missing
        )
        set_global_expert_location_metadata(rank.metadata, allow_overwrite=True)
        with (
            mock.patch.object(ElasticEPStateManager, "_instance", state),
            mock.patch.object(eplb_manager, "get_global_expert_distribution_recorder", lambda: recorder),
            mock.patch("sglang.srt.eplb.expert_distribution.get_global_expert_distribution_recorder", lambda: recorder),
            mock.patch("sglang.srt.eplb.expert_location.ModelConfigForExpertLocation.from_model_config", _sizes),
            mock.patch.object(process, "settings", lambda: settings),
            mock.patch.object(dist, "get_rank", lambda group=None, n=number: n),
            mock.patch.object(dist, "broadcast", broadcast),
            mock.patch.object(dist, "batch_isend_irecv", exchange),
            get_parallel().override(tp_rank=number, moe_ep_rank=number, tp_size=RANKS, moe_ep_size=RANKS),
        ):
            manager = manager_class(eplb_manager.EPLBManager)(
                model_config=None,
                get_model=lambda model=model: model,
                get_expert_location_updater=ExpertLocationUpdater,
                get_expert_backup_client=lambda: None,
                get_weight_updater=lambda: SimpleNamespace(update_weights_from_disk=load_missing),
            )
            for _ in manager.rebalance():
                pass


def _sizes(model_config: Any) -> Any:
    return SimpleNamespace(num_layers=LAYERS, num_logical_experts=EXPERTS, num_groups=None)


def seen(ranks: list[Rank], alive: list[int]) -> dict[str, Any]:
    """What the living have: all of it must hold at once."""
    maps = [rank.metadata.physical_to_logical_map for rank in (ranks[n] for n in alive)]
    living = [slot for slot in range(SLOTS) if slot // LOCAL in alive]
    gone = [slot for slot in range(SLOTS) if slot not in living]
    wrong, named = 0, set()
    for number in alive:
        rank, metadata = ranks[number], ranks[number].metadata
        for layer, (weights,) in rank.weights.items():
            own = metadata.physical_to_logical_map[layer, number * LOCAL : (number + 1) * LOCAL]
            wrong += int((weights != own).sum())
        named |= set(metadata.logical_to_all_physical_map.unique().tolist()) - {-1}
        static = metadata.logical_to_rank_dispatch_physical_map
        if static is not None:
            named |= set(static.unique().tolist())
            found = torch.gather(metadata.physical_to_logical_map, 1, static)
            halves = static.shape[1] // EXPERTS  # under `primary` two tables, one behind the other
            wrong += int((found != torch.arange(EXPERTS).repeat(halves)).sum())
    return {
        "agree": all(torch.equal(maps[0], other) for other in maps),
        "gone slots": sorted(set(maps[0][:, gone].flatten().tolist())),
        "names gone": sorted(named & set(gone)),
        "experts": [len(set(row[living].tolist())) for row in maps[0]],
        "valid": bool((ranks[alive[0]].metadata.logical_to_all_physical_map_num_valid > 0).all()),
        "wrong": wrong,
        "from disk": sum(ranks[n].from_disk for n in alive),
    }


def findings() -> dict[str, Any]:
    from sglang.srt.runtime_context import get_context
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    flags = {
        "device": "cpu", "tp_size": RANKS, "ep_size": RANKS, "ep_num_redundant_experts": SLOTS - EXPERTS,
        "eplb_rebalance_num_iterations": 10, "expert_distribution_recorder_buffer_size": 1,
        "elastic_ep_backend": "mooncake", "model_path": "", "load_format": "auto",
    }  # fmt: skip
    found: dict[str, Any] = {}
    rules = (("static", 0), ("cover", 0), ("cover_balanced", 0), ("primary", 0), ("primary", 1))
    for rule, further in rules:
        name = f"{rule}+{further}" if further else rule
        with get_context().override_server_args(**flags, ep_dispatch_algorithm=rule, eplb_algorithm="affinity"):
            ranks = world(rule, rule, further)
            round_of(ranks, [0, 1, 3], some_window(1), "affinity", rule, further)
            found[f"{name} fault"] = seen(ranks, [0, 1, 3])
            before = ranks[0].metadata.physical_to_logical_map.clone()
            round_of(ranks, [0, 1, 3], empty_window(), "affinity", rule, further)
            found[f"{name} nothing recorded, stays"] = torch.equal(before, ranks[0].metadata.physical_to_logical_map)
            round_of(ranks, [0, 1, 3], some_window(2), "affinity", rule, further)
            found[f"{name} next"] = seen(ranks, [0, 1, 3])
            ranks = world(rule, rule, further)
            round_of(ranks, [1, 2, 3], empty_window(), "affinity", rule, further)
            found[f"{name} fault of rank 0, nothing recorded"] = seen(ranks, [1, 2, 3])
            before = ranks[1].metadata.physical_to_logical_map.clone()
            round_of(ranks, [1, 2], some_window(3), "affinity", rule, further)
            found[f"{name} too few slots, stays"] = torch.equal(before, ranks[1].metadata.physical_to_logical_map)
    with get_context().override_server_args(**flags, ep_dispatch_algorithm="static", eplb_algorithm="elasticity_aware"):
        ranks = world("static", "static")
        round_of(ranks, [0, 1, 3], some_window(1), "elasticity_aware", "static")
        found["SGLang's"] = seen(ranks, [0, 1, 3])
    return found
