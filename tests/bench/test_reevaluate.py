"""Rows that are computed again from what they left."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

from bench.figures.reevaluate import reevaluate
from bench.harness.profile import Profile
from bench.harness.request_log import RequestLog
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.schedule import CellKey
from sglang_eplb_affinity.domain.errors import InputError
from tests.bench.conftest import AFFINITY_LOG, make_record
from tests.bench.loads import closed_loop

VOID = ("0 requests decoded in the steady part; a row needs 4: send more",)
WORK = [8 * (i + 1) for i in range(8)] + [64] * 80
DECODE = (
    "[{time} DP0 TP0 EP0] Decode batch, #running-req: 8, #token: 1, token usage: 0.05, cuda graph: False, "
    "gen throughput (token/s): 1.0, #queue-req: 0\n"
)


def logged(unix: float) -> str:
    """A time as a server on this machine logs it."""
    return datetime.fromtimestamp(unix).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def rebalance(unix: float) -> str:
    line = next(line for line in AFFINITY_LOG.splitlines() if '"result": "applied"' in line)
    return f"[{logged(unix)} TP0 EP0]{line.split(']', 1)[1]}\n"


def leave_row(folder: RunFolder, arm: str, log: RequestLog, server_log: str, void: tuple[str, ...] = VOID) -> CellKey:
    """A row as the benchmark leaves it, with a record of figures that are not what they should be."""
    key = CellKey(0, arm, 8)
    ended = datetime.fromtimestamp(log.epoch + float(log.end.max()) + 2, timezone.utc)
    metrics = {"completed": 88.0, "output_tokens": float(sum(WORK)), "p50_ttft_ms": 1.0, "other_cores": 0.25}
    record = replace(make_record(key), requests=88, metrics=metrics, void=void, finished=ended.isoformat()[:19] + "Z")
    folder.store.append(record)
    (folder.path / "cells" / key.name).mkdir(parents=True)
    log.save(folder.path / "cells" / key.name / "requests.npz")
    (folder.path / "server").mkdir(exist_ok=True)
    (folder.path / "server" / f"{arm}.log").write_text(server_log)
    return key


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    plan = RunPlan(Profile.named("h200-x2"), ("none", "vanilla", "affinity"), (8,), 1, "random token ids", "")
    found = RunFolder(tmp_path / "run")
    found.path.mkdir()
    found.write_json("run.json", plan.to_json())
    return found


def test_rows_get_the_figures_of_now_and_keep_where_they_were_measured(folder: RunFolder) -> None:
    log = closed_loop(8, WORK)
    before, during = log.epoch - 100, log.epoch + 5
    serving = DECODE.format(time=logged(during))
    none = leave_row(folder, "none", log, serving)
    moved = leave_row(folder, "affinity", log, rebalance(before) + rebalance(during) + serving)
    still = leave_row(folder, "vanilla", log, rebalance(before) + serving)
    assert reevaluate(folder) == 3
    latest = folder.store.latest()
    assert len(folder.store.records()) == 6
    assert latest[none].void == latest[moved].void == ()
    assert latest[still].void == ("no rebalance during the cell",)
    again = latest[none]
    assert again.metrics["p50_ttft_ms"] == pytest.approx(100.0) and again.metrics["server_in_flight"] == 8
    assert again.metrics["other_cores"] == 0.25
    assert again.provenance["commit"] == "abcdef1" and set(again.provenance["evaluated_with"]) == {"commit", "date"}


def test_servers_that_took_turns_have_a_log_a_block(folder: RunFolder) -> None:
    log = closed_loop(8, WORK)
    key = leave_row(folder, "none", log, DECODE.format(time=logged(log.epoch + 5)))
    (folder.path / "server" / "none.log").rename(folder.path / "server" / "b0-none.log")
    assert reevaluate(folder) == 1 and folder.store.latest()[key].void == ()


def test_what_only_the_measurement_could_see_still_voids(folder: RunFolder) -> None:
    log = closed_loop(8, WORK)
    void = ("5 of 6 output tokens arrived", *VOID)
    key = leave_row(folder, "none", log, DECODE.format(time=logged(log.epoch + 5)), void)
    assert reevaluate(folder) == 1
    assert folder.store.latest()[key].void == void[:1]


def test_rows_that_left_too_little_are_refused(folder: RunFolder) -> None:
    with pytest.raises(InputError, match=r"no row has its requests\.npz and its server's log"):
        reevaluate(folder)
    log = closed_loop(8, WORK)
    leave_row(folder, "none", log, DECODE.format(time=logged(log.epoch - 500)))  # another sitting's log
    with pytest.raises(InputError, match=r"no row has its requests\.npz"):
        reevaluate(folder)
    later = replace(log, epoch=log.epoch + 500)
    later.save(folder.path / "cells" / "b0-none-c8" / "requests.npz")
    with pytest.raises(InputError, match="not the requests of the row that was recorded at"):
        reevaluate(folder)
    assert len(folder.store.records()) == 1
