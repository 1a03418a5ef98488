"""Who is told of rebalance rounds and recorded windows on rank 0: the map recorder, the metrics, the loaded map."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from sglang_eplb_affinity.sglang_hooks.topk_flags import records_affinity

if TYPE_CHECKING:
    from sglang_eplb_affinity.domain.routing import RoutingWindow
    from sglang_eplb_affinity.rebalance.metrics import PlacementMetrics

logger = logging.getLogger(__name__)


def start(server_args: Any, dp_rank: int | None) -> None:
    """Every rank calls it; only rank 0 of a group, the one that reports rounds, has observers."""
    if not records_affinity(server_args) and server_args.init_expert_location == "trivial":
        return
    if dist.is_initialized() and dist.get_rank():
        return
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    from sglang_eplb_affinity.sglang_hooks import loaded_map, rebalance

    metadata = get_global_expert_location_metadata()
    if metadata is None:
        return
    if loaded_map.in_force is not None:
        rebalance.observers.append(loaded_map.in_force)
    if server_args.enable_metrics:
        try:
            rebalance.observers.append(_metrics(server_args, metadata, dp_rank))
        except Exception:
            logger.exception("[eplb-affinity] no metrics of placement")
    if server_args.eplb_record_map is not None:
        rebalance.observers.append(_map_recorder(server_args, metadata.ep_size))


def window_recorded(window: RoutingWindow) -> None:
    """On every rank, with the same window. Never raises: a report must not stop the server."""
    from sglang_eplb_affinity.rebalance.metrics import PlacementMetrics
    from sglang_eplb_affinity.sglang_hooks import loaded_map, rebalance

    if loaded_map.in_force is None:
        return
    try:
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

        figures = loaded_map.in_force.window_recorded(window, rebalance.map_of(get_global_expert_location_metadata()))
        for observer in rebalance.observers:
            if figures is not None and isinstance(observer, PlacementMetrics):
                observer.set_figures("contiguous", figures.contiguous)
                observer.set_figures("after", figures.loaded)
    except Exception:
        logger.exception("[eplb-affinity] the loaded map could not be measured")


def _metrics(server_args: Any, metadata: Any, dp_rank: int | None) -> PlacementMetrics:
    from sglang_eplb_affinity.rebalance.metrics import PlacementMetrics
    from sglang_eplb_affinity.sglang_hooks import rebalance

    labels = {"model_name": server_args.served_model_name or server_args.model_path}
    if server_args.dp_size > 1 and not server_args.enable_dp_attention:
        labels["dp_rank"] = str(dp_rank)  # each replica has a map of its own
    labels |= {str(name): str(value) for name, value in (server_args.extra_metric_labels or {}).items()}
    topology = rebalance.topology_of(server_args, metadata.ep_size)
    return PlacementMetrics(labels, topology, rebalance.map_of(metadata))


def _map_recorder(server_args: Any, ep_size: int) -> Any:
    import importlib.metadata

    from sglang_eplb_affinity import __version__
    from sglang_eplb_affinity.formats.recorded_map import MapOrigin
    from sglang_eplb_affinity.rebalance.map_recorder import MapRecorder
    from sglang_eplb_affinity.sglang_hooks import rebalance
    from sglang_eplb_affinity.sglang_hooks.initial_map import placement_of
    from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape

    shape = MoeShape.of(server_args.get_model_config().hf_text_config)
    assert shape is not None  # checked at start-up
    placement = placement_of(server_args, shape, ep_size)
    return MapRecorder(
        Path(server_args.eplb_record_map),
        MapOrigin(
            model=placement.model,
            topology=placement.topology,
            num_slots=placement.num_slots,
            algorithm=server_args.eplb_algorithm,
            dispatch=rebalance.dispatch_rule(server_args),
            round=0,
            written="",
            sglang_version=importlib.metadata.version("sglang"),
            package_version=__version__,
        ),
    )
