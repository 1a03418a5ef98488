"""From what a cell's load and server left to a record of the store."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from bench.figures.metrics import latency_metrics, placement_metrics
from bench.figures.rebalance_log import LogSummary, parse_log
from bench.figures.steady import timeline
from bench.figures.validity import void_reasons
from bench.harness.arms import ARMS
from bench.harness.environment import now, provenance
from bench.harness.links import ACTIVE, Link
from bench.harness.load import LoadResult
from bench.harness.probe import Placement
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.schedule import CellKey, block_seed
from bench.harness.server import Server
from bench.harness.store import CellRecord
from bench.harness.workload import Workload
from sglang_eplb_affinity.domain.files import write_atomically

NOTHING = LogSummary((), 0)


@dataclass(frozen=True)
class Measured:
    """``sitting`` names the start of servers that the cell was measured with."""

    cell: CellKey
    work: Workload
    sitting: str
    probed: Placement | None


def record_cell(
    measured: Measured,
    result: LoadResult,
    plan: RunPlan,
    folder: RunFolder,
    server: Server | None,
    start: int,
    other_cores: float | None,
) -> CellRecord:
    """``start``: size of the server's log when the load began. Leaves timeline.npz beside the cell's requests."""
    cell, load, link = measured.cell, plan.profile.load_named(measured.cell.load), Link.of(plan.profile)
    life_log = server.log_text() if server is not None else ""
    cell_log = server.log_text(start) if server is not None else ""
    life, during = (parse_log(life_log), parse_log(cell_log)) if server is not None else (NOTHING, NOTHING)
    metrics: dict[str, float] = {}
    if result.requests is not None:
        metrics = latency_metrics(result.requests, load, cell.concurrency, cell_log)
        _write_timeline(result, folder, cell)
    if other_cores is not None:
        metrics["other_cores"] = other_cores
    void = void_reasons(
        ARMS[cell.arm],
        requested=measured.work.requests,
        wanted_tokens=measured.work.output_tokens,
        concurrency=cell.concurrency,
        open_loop=bool(load.request_rate),
        metrics=metrics,
        server_life=life,
        cell=during,
        error=result.error,
        speeds=plan.profile.server.engine != "cpu",
        kind=load.kind,
        one_map=bool(plan.profile.server.plan_trace),
        held_back=plan.profile.server.held_back(cell.concurrency),
    )
    if link.emulated and not result.error and ACTIVE not in life_log:
        void = (*void, f"the server's log does not show the emulated link ({link.title})")
    command = list(server.command) if server is not None else []
    flags = command[command.index("--model-path") + 2 :] if command else []
    flags = [flag.replace(str(folder.path), f"results/{folder.name}") for flag in flags]
    return CellRecord(
        key=cell,
        finished=now(),
        requests=measured.work.requests,
        seed=block_seed(plan.profile.seed, cell.block),
        workload_sha256=measured.work.sha256,
        metrics=metrics,
        placement=placement_metrics(life, during, measured.probed),
        rebalances=during.rebalances,
        void=void,
        provenance={
            **provenance(),
            "server_flags": flags,
            "sitting": measured.sitting,
            "link": link.name,
            "kind": link.kind,
        },
    )


def _write_timeline(result: LoadResult, folder: RunFolder, cell: CellKey) -> None:
    assert result.requests is not None
    buffer = io.BytesIO()
    arrays = timeline(result.requests)
    compact = {name: values.astype(np.float32) for name, values in arrays.items()}
    np.savez_compressed(buffer, epoch=np.float64(result.requests.epoch), **compact)  # type: ignore[arg-type]
    path = folder.path / "cells" / cell.name / "timeline.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
