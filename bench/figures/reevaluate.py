"""A run's figures once more from what its rows left, for when the way in which they are computed has changed.

Needs each row's requests.npz and the servers' logs. Records are added to the store, the old ones stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from bench.figures.metrics import latency_metrics
from bench.figures.rebalance_log import parse_log
from bench.figures.server_log import lines_between
from bench.figures.validity import void_reasons
from bench.harness.arms import ARMS
from bench.harness.environment import now, provenance
from bench.harness.request_log import RequestLog
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.store import CellRecord
from sglang_eplb_affinity.domain.errors import InputError

# From the last token to the record: the load generator writes what it has seen.
UNTIL_RECORDED_S = 60.0
# Reasons that void a row and that only who measured it could see.
SEEN_ONCE = ("output tokens arrived", "emulated link")


def reevaluate(folder: RunFolder) -> int:
    """Add a record with figures of now for each row that still has its requests; returns their number.

    What a row's figures were computed with is in ``evaluated_with`` of its provenance, and where it was measured stays
    as it was. Rows that an error ended, and rows of whose time no server's log has anything, keep their records. Raises
    InputError if no row has what is needed.
    """
    plan = folder.plan()
    found = list(_records(folder, plan))
    if not found:
        raise InputError(f"{folder.path}: no row has its requests.npz and its server's log")
    for record in found:
        folder.store.append(record)
    return len(found)


def _records(folder: RunFolder, plan: RunPlan) -> Iterator[CellRecord]:
    newest = {record.key: record for record in folder.store.records()}
    logs: dict[Path, str] = {}
    for key, record in newest.items():
        requests = folder.path / "cells" / key.name / "requests.npz"
        # Side by side, an arm has one server; in turns, one a block.
        names = (f"{key.arm}.log", f"b{key.block}-{key.arm}.log")
        log = next((path for name in names if (path := folder.path / "server" / name).is_file()), None)
        if "completed" not in record.metrics or not requests.is_file() or log is None:
            continue
        if log not in logs:
            logs[log] = log.read_text(encoding="utf-8", errors="replace")
        seen = RequestLog.load(requests)
        finished = datetime.fromisoformat(record.finished.replace("Z", "+00:00")).timestamp()
        if abs(finished - seen.epoch - float(seen.end.max())) > UNTIL_RECORDED_S:
            raise InputError(f"{requests}: not the requests of the row that was recorded at {record.finished}")
        begin, end = seen.epoch + float(seen.start.min()), seen.epoch + float(seen.end.max())
        during = lines_between(logs[log], begin, end)
        if during:
            yield _again(record, seen, during, lines_between(logs[log], 0.0, end), plan)


def _again(record: CellRecord, seen: RequestLog, during: str, life: str, plan: RunPlan) -> CellRecord:
    """``during``, ``life``: the server's log of the row, and all of it until the row's end."""
    load = plan.profile.load_named(record.key.load)
    metrics = latency_metrics(seen, load, record.key.concurrency, during)
    metrics |= {name: record.metrics[name] for name in ("other_cores",) if name in record.metrics}
    void = void_reasons(
        ARMS[record.key.arm],
        requested=record.requests,
        wanted_tokens=int(record.metrics["output_tokens"]),
        concurrency=record.key.concurrency,
        open_loop=bool(load.request_rate),
        metrics=metrics,
        server_life=parse_log(life),
        cell=parse_log(during),
        speeds=plan.profile.server.engine != "cpu",
        kind=load.kind,
        one_map=bool(plan.profile.server.plan_trace),
        held_back=plan.profile.server.held_back(record.key.concurrency),
    )
    void += tuple(reason for reason in record.void if any(part in reason for part in SEEN_ONCE) and reason not in void)
    evaluated = {"commit": provenance()["commit"], "date": now()}
    return replace(record, metrics=metrics, void=void, provenance={**record.provenance, "evaluated_with": evaluated})
