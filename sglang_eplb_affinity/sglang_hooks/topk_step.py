"""The hook at every MoE layer's top-k ids, while they are logical: our replica choice, and recording."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sglang_eplb_affinity.device.map_and_record import LayerTables, MapAndRecord, Placement
from sglang_eplb_affinity.device.recorder import one_group
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, planned_rule
from sglang_eplb_affinity.sglang_hooks.recording import ServerRecorder
from sglang_eplb_affinity.sglang_hooks.settings import Settings

# What is hung onto SGLang's objects: both live as long as the placement whose tensors they point at.
_INFOS, _TABLES = "eplb_affinity_infos", "eplb_affinity_tables"


class InfoTables(NamedTuple):
    """Of one layer: for passes of many rows, for those among them of low-latency mode, and for passes of few rows."""

    large: LayerTables
    low_latency: LayerTables
    small: LayerTables


class TopkStep:
    """Callable for each layer. ``recorder`` None: nothing is recorded."""

    def __init__(self, settings: Settings, metadata: Any, recorder: ServerRecorder | None) -> None:
        from sglang.srt.runtime_context import get_parallel

        self.chooses = settings.chooses_replicas
        self._primary_rows = settings.primary_rows
        self._low_latency = low_latency_passes(settings)
        self._recorder = recorder
        placement = None
        if metadata is not None:
            placement = Placement(
                topology=settings.topology,
                num_slots=metadata.num_physical_experts,
                max_replicas=metadata.num_physical_experts - metadata.num_logical_experts + 1,
                source_gpu=get_parallel().moe_ep_rank if settings.own_tokens else None,
            )
        top_k = settings.shape.top_k if settings.shape is not None else 1
        self._map_only = MapAndRecord(top_k, None, placement)
        self._both = None if recorder is None else MapAndRecord(top_k, recorder.recorder, placement)

    def __call__(
        self, layer: int | None, topk_ids: torch.Tensor, num_valid_rows: torch.Tensor | None, info: Any
    ) -> bool:
        """Whether ``topk_ids`` [rows, >= top_k] are now physical, with padding masked; else SGLang does both.

        ``layer`` None: a layer outside the placement. ``info``: SGLang's ExpertLocationDispatchInfo or None.
        """
        tables = None
        if self.chooses and info is not None and info.ep_dispatch_algorithm in DISPATCH_RULES:
            of_layer = tables_of(info)
            # Both are known when a CUDA graph is captured.
            if topk_ids.shape[0] <= self._primary_rows:
                tables = of_layer.small
            else:
                tables = of_layer.low_latency if self._low_latency() else of_layer.large
        rows = None
        if layer is not None and self._recorder is not None:
            rows = self._recorder.rows_to_record(layer, topk_ids.shape[0])
        if rows is not None and self._both is not None and layer is not None:
            self._both(layer, topk_ids, rows, tables, num_valid_rows)
        elif tables is not None:
            self._map_only(layer or 0, topk_ids, one_group(topk_ids.shape[0]), tables, num_valid_rows)
        return tables is not None

    def known_info(self, metadata: Any, layer: int) -> Any:
        """The layer's dispatch info made before, since the tensors it points at are updated in place."""
        return getattr(metadata, _INFOS, {}).get(layer) if self.chooses else None

    def remember_info(self, metadata: Any, layer: int, info: Any) -> None:
        if self.chooses:
            metadata.__dict__.setdefault(_INFOS, {})[layer] = info


def tables_of(info: Any) -> InfoTables:
    """Made once, and kept with ``info``."""
    tables: InfoTables | None = getattr(info, _TABLES, None)
    if tables is None:
        looked_up = info.partial_logical_to_rank_dispatch_physical_map
        if info.ep_dispatch_algorithm == "static":
            static = LayerTables("static", looked_up)
            tables = InfoTables(static, static, static)
        else:
            replicas = LayerTables(
                planned_rule(info.ep_dispatch_algorithm),
                info.partial_logical_to_all_physical_map,
                info.partial_logical_to_all_physical_map_num_valid,
            )
            tables = InfoTables(replicas, replicas, replicas)
            if info.ep_dispatch_algorithm == "primary":  # rank_table of rebalance/layer_moves.py
                primary, static = (LayerTables("static", half) for half in looked_up.chunk(2))
                tables = InfoTables(replicas, static, primary)
        setattr(info, _TABLES, tables)
    return tables


def low_latency_passes(settings: Settings) -> Callable[[], bool]:
    """Whether the pass at hand dispatches in DeepEP's low-latency mode; asked under ``primary`` only."""
    if settings.table_rule != "primary" or settings.dispatch_mode != "auto":
        low_latency = settings.dispatch_mode == "low_latency"
        return lambda: low_latency
    from sglang.srt.layers.dp_attention import get_is_extend_in_batch

    return lambda: not get_is_extend_in_batch()  # as DeepEPMode.resolve
