"""Who is told of rebalance rounds and recorded windows on rank 0: the map recorder, the metrics, the loaded map."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_eplb_affinity.rebalance.first_rank import this_rank
from sglang_eplb_affinity.sglang_hooks import process
from sglang_eplb_affinity.sglang_hooks.location import map_of
from sglang_eplb_affinity.sglang_hooks.settings import Settings

if TYPE_CHECKING:
    from sglang_eplb_affinity.domain.expert_map import ExpertMap
    from sglang_eplb_affinity.domain.routing import RoutingWindow
    from sglang_eplb_affinity.rebalance.map_recorder import MapRecorder
    from sglang_eplb_affinity.rebalance.metrics import PlacementMetrics
    from sglang_eplb_affinity.rebalance.round_record import RoundRecord

logger = logging.getLogger(__name__)


def start(settings: Settings, dp_rank: int | None) -> None:
    """Every rank calls it; only rank 0 of a group, the one that reports rounds, has observers."""
    if not settings.records and not settings.loads_map:
        return
    if this_rank():
        return
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    if metadata is None:
        return
    process.observers.append(_LastRound())
    if process.loaded_map is not None:
        process.observers.append(process.loaded_map)
    if settings.reports.labels is not None:
        try:
            process.observers.append(_metrics(settings, metadata, dp_rank))
        except Exception:
            logger.exception("[eplb-affinity] no metrics of placement")
    if settings.reports.record_map is not None:
        process.observers.append(_map_recorder(settings, settings.reports.record_map))


class _LastRound:
    """For /server_info, which the scheduler's thread answers: one assignment, nothing is computed there."""

    def round_finished(self, record: RoundRecord, in_force: ExpertMap) -> None:
        process.last_round = record.to_json()


def window_recorded(window: RoutingWindow) -> None:
    """On every rank, with the same window. Never raises: a report must not stop the server."""
    from sglang_eplb_affinity.rebalance.metrics import PlacementMetrics

    if process.loaded_map is None:
        return
    try:
        from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

        figures = process.loaded_map.window_recorded(window, map_of(get_global_expert_location_metadata()))
        for observer in process.observers:
            if figures is not None and isinstance(observer, PlacementMetrics):
                observer.set_figures("contiguous", figures.contiguous)
                observer.set_figures("after", figures.loaded)
    except Exception:
        logger.exception("[eplb-affinity] the loaded map could not be measured")


def _metrics(settings: Settings, metadata: Any, dp_rank: int | None) -> PlacementMetrics:
    from sglang_eplb_affinity.rebalance.metrics import PlacementMetrics

    labels = dict(settings.reports.labels or {})
    if settings.reports.own_map:
        labels["dp_rank"] = str(dp_rank)
    metrics = PlacementMetrics(labels, settings.topology, map_of(metadata))
    history = None if process.loaded_map is None else process.loaded_map.history
    if history is not None:
        metrics.set_means("promised", history.promised)
        metrics.set_means("best_map", history.best_figures)
    return metrics


def _map_recorder(settings: Settings, path: str) -> MapRecorder:
    import importlib.metadata

    from sglang_eplb_affinity import __version__
    from sglang_eplb_affinity.formats.recorded_map import MapOrigin
    from sglang_eplb_affinity.rebalance.map_recorder import MapRecorder
    from sglang_eplb_affinity.sglang_hooks.initial_map import placement_of

    placement = placement_of(settings)
    return MapRecorder(
        Path(path),
        MapOrigin(
            model=placement.model,
            topology=placement.topology,
            num_slots=placement.num_slots,
            algorithm=settings.algorithm,
            dispatch=settings.rule,
            round=0,
            written="",
            sglang_version=importlib.metadata.version("sglang"),
            package_version=__version__,
        ),
    )
