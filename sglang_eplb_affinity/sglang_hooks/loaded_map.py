"""--init-expert-location in each rank: the map is read or planned on rank 0, broadcast, put in force and reported.

Rank 0 logs ``[eplb-affinity] map {json}`` when the map is in force, with the figures that the file has, and once more
(``"event": "measured"``) with those of the server's own traffic, at the first window that is recorded under it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sglang_eplb_affinity.dispatch.evaluate import moved_experts
from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.dispatch.primaries import uneven_layers
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import plan
from sglang_eplb_affinity.rebalance.first_rank import from_one_rank
from sglang_eplb_affinity.rebalance.map_history import MapHistory
from sglang_eplb_affinity.rebalance.round_record import RoundRecord
from sglang_eplb_affinity.sglang_hooks import process
from sglang_eplb_affinity.sglang_hooks.adapter import adapter
from sglang_eplb_affinity.sglang_hooks.initial_map import InitialMap, placement_of, read_initial_map
from sglang_eplb_affinity.sglang_hooks.location import metadata_of
from sglang_eplb_affinity.sglang_hooks.server_arguments import ALGORITHM, INITIAL_MAP
from sglang_eplb_affinity.sglang_hooks.settings import Settings

logger = logging.getLogger(__name__)


def load(settings: Settings, model_config: Any, ep_rank: int) -> Any | None:
    """SGLang's metadata of the map that the flag names; None where SGLang has to do it (elastic EP; a dump for another
    algorithm). A collective call: rank 0 reads, so that files that differ between hosts cannot split the ranks."""
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().elastic_ep_initial_size is not None:
        return None
    common = adapter().init_common(model_config)
    if common is None:
        raise InputError(f"{INITIAL_MAP}: SGLang cannot place the experts of this model's class; leave the flag out")
    model = common["model_config_for_expert_location"]
    initial: list[InitialMap] = []

    def read_or_plan() -> np.ndarray | None:
        initial.append(read_initial_map(settings.initial_map, placement_of(settings)))
        expert_map = _map_or_plan(initial[0], settings)
        return None if expert_map is None else expert_map.physical_to_logical

    answer = from_one_rank(read_or_plan, (model.num_layers, common["num_physical_experts"]), settings.device)
    if answer.error is not None:
        raise answer.error
    if answer.failed:
        raise InputError(f"{INITIAL_MAP} {settings.initial_map}: rank 0 could not load it; its log says why")
    if answer.rows is None:
        return None
    loaded = ExpertMap(answer.rows, model.num_logical_experts)
    if initial:
        process.loaded_map = LoadedMap(initial[0], loaded, settings.topology, settings.rule)
        process.loaded_map.log_loaded()
        uneven = uneven_layers(loaded, settings.topology) if settings.table_rule == "primary" else ()
        if len(uneven):
            logger.info("[eplb-affinity] %d layers of the map allow no even choice of primary slots", len(uneven))
    return metadata_of(
        loaded, settings.topology, settings.table_rule, settings.device, ep_rank,
        further_slots=settings.planner.further_slots,
    )  # fmt: skip


def _map_or_plan(initial: InitialMap, settings: Settings) -> ExpertMap | None:
    if initial.expert_map is not None:
        return initial.expert_map
    if settings.algorithm != ALGORITHM or initial.window is None:
        return None
    slots = initial.window.num_experts + settings.redundant
    planned = plan(initial.window, settings.topology, slots, settings.planner_from_scratch)
    logger.info("[eplb-affinity] initial map planned: %s", planned.report.summary())
    return planned.expert_map


@dataclass(frozen=True)
class Comparison:
    """SGLang's start placement beside the loaded map, on the same tokens."""

    contiguous: MapFigures
    loaded: MapFigures

    def to_json(self) -> dict[str, float]:
        pairs = (("contiguous", self.contiguous), ("loaded", self.loaded))
        return {f"{name}_{of}": round(value, 4) for of, figures in pairs for name, value in asdict(figures).items()}


class LoadedMap:
    """On rank 0: what is said of a loaded map. ``history``: what its file says of the rounds before."""

    def __init__(self, initial: InitialMap, loaded: ExpertMap, topology: Topology, rule: DispatchRule) -> None:
        self._initial, self._loaded, self._topology, self._rule = initial, loaded, topology, rule
        self._measured = False
        origin = initial.origin
        self.history = None if origin is None else MapHistory.of_file(loaded, origin, initial.source)

    def log_loaded(self) -> None:
        record = {"event": "loaded", "source": self._initial.source, **self._placed()}
        origin = self._initial.origin
        if self._initial.window is not None:
            figures = self._figures(self._initial.window)
            if figures is not None:
                record |= figures.to_json() | {"figures_of": "the dump that it was planned from"}
        elif origin is not None:
            record |= {
                "recorded": origin.written,
                "recorded_round": origin.round,
                "recorded_model": origin.model.path,
                "algorithm": origin.algorithm,
                "routing_checksum": origin.routing_checksum,
            }
            if origin.contiguous is not None and origin.recorded is not None:
                record |= Comparison(origin.contiguous, origin.recorded).to_json()
                record["figures_of"] = "the window that it was planned from, as recorded in the file"
        self._log(record)
        if origin is not None and origin.dispatch != self._rule:
            logger.warning(
                "[eplb-affinity] the map was planned for replica choice %s, but the server has %s: its load will be "
                "less even than recorded",
                origin.dispatch,
                self._rule,
            )

    def window_recorded(self, window: RoutingWindow, current: ExpertMap) -> Comparison | None:
        """At the first window with tokens: the figures of the server's own traffic, if the map is still in force."""
        if self._measured or not window.counts.any():
            return None
        self._measured = True
        if not np.array_equal(current.physical_to_logical, self._loaded.physical_to_logical):
            return None
        figures = self._figures(window)
        if figures is not None:
            self._log_measured(figures, int(window.counts.sum(1).max()))
        return figures

    def round_finished(self, record: RoundRecord, in_force: ExpertMap) -> None:
        """A round observer, for rounds whose window is not seen by :meth:`window_recorded` (asynchronous ones)."""
        if self._measured:
            return
        if record.contiguous is not None and record.before is not None:
            self._log_measured(Comparison(record.contiguous, record.before), record.tokens)
        self._measured = record.before is not None or bool(record.committed_layers)

    def _log_measured(self, figures: Comparison, tokens: int) -> None:
        record = {"event": "measured", "source": self._initial.source, "tokens": tokens, **figures.to_json()}
        self._log(record | {"figures_of": "this server's traffic"})

    def _placed(self) -> dict[str, Any]:
        home = self._loaded.contiguous_like()
        elsewhere = moved_experts(home, self._loaded, self._topology)
        return {
            "layers": self._loaded.num_layers,
            "experts": self._loaded.num_experts,
            "slots": self._loaded.num_slots,
            "gpus": self._topology.num_gpus,
            "nodes": self._topology.num_nodes,
            # Both are 0 for SGLang's start placement.
            "relocated_experts": int(elsewhere.sum()),
            "relocated_layers": int((elsewhere > 0).sum()),
            "replicated_experts": int((self._loaded.replica_counts() > 1).sum()),
        }

    def _figures(self, window: RoutingWindow) -> Comparison | None:
        contiguous = MapFigures.of(window, self._loaded.contiguous_like(), self._topology, self._rule)
        loaded = MapFigures.of(window, self._loaded, self._topology, self._rule)
        return None if contiguous is None or loaded is None else Comparison(contiguous, loaded)

    def _log(self, record: dict[str, Any]) -> None:
        logger.info("[eplb-affinity] map %s", json.dumps(record))
