"""The append-only store of measured cells, each with where it comes from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.figures.rebalance_log import Rebalance
from bench.harness.schedule import CellKey

SCHEMA = 1


@dataclass(frozen=True)
class CellRecord:
    """One measured cell. ``void`` says why it does not count; empty if it does."""

    key: CellKey
    finished: str  # UTC, ISO 8601
    requests: int
    seed: int
    workload_sha256: str
    metrics: dict[str, float]
    placement: dict[str, float | int | None]
    rebalances: tuple[Rebalance, ...]
    void: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True)

    @staticmethod
    def from_json(line: str) -> CellRecord:
        data = json.loads(line)
        if data.pop("schema") != SCHEMA:
            raise ValueError("unknown schema")
        data["key"] = CellKey(**data["key"])
        data["rebalances"] = tuple(Rebalance.of(r) for r in data["rebalances"])
        data["void"] = tuple(data["void"])
        return CellRecord(**data)


class Store:
    """JSON Lines file; lines are only ever added. A line that an interruption cut short is passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: CellRecord) -> None:
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(record.to_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[CellRecord]:
        """Everything that was ever measured, oldest first."""
        if not self.path.is_file():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(CellRecord.from_json(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        return found

    def latest(self) -> dict[CellKey, CellRecord]:
        return latest_records(self.records())

    def complete(self) -> set[CellKey]:
        """Cells that need not be measured again: a row that counts is there."""
        return {key for key, record in self.latest().items() if not record.void}


def latest_records(records: Iterable[CellRecord]) -> dict[CellKey, CellRecord]:
    """One record for each cell: the newest that counts, else the newest."""
    best: dict[CellKey, CellRecord] = {}
    for record in records:
        known = best.get(record.key)
        if known is None or known.void or not record.void:
            best[record.key] = record
    return best
