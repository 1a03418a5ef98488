"""--eplb-record-map: the map in force, written to a file after each round that planned one."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.formats.recorded_map import MapOrigin, save_recorded_map
from sglang_eplb_affinity.rebalance.round_record import RoundRecord

logger = logging.getLogger(__name__)


class MapRecorder:
    """A round observer. ``server``: what does not change from round to round; its other fields are filled in here.

    A round writes the file if it planned a map on a recorded window: its result is ``applied`` or ``unchanged``, or
    some layers were committed before it failed. Other rounds leave the file of the last such round, as do rounds while
    ranks are gone (elastic EP): their maps fit no server that starts.
    """

    def __init__(self, path: Path, server: MapOrigin) -> None:
        self._path, self._server = path, server

    def round_finished(self, record: RoundRecord, in_force: ExpertMap) -> None:
        if in_force.num_slots != self._server.num_slots:
            return
        if record.result not in ("applied", "unchanged") and not record.committed_layers:
            return
        origin = replace(
            self._server,
            algorithm=record.algorithm,
            round=record.round,
            written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            routing_checksum=record.routing_checksum,
            routing_tokens=record.tokens,
            contiguous=record.contiguous,
            recorded=record.after,
            **({} if record.history is None else record.history.to_file(in_force)),
        )
        save_recorded_map(self._path, in_force, origin)
        logger.info("[eplb-affinity] map of round %d recorded in %s", record.round, self._path)
