"""The tidy table of a run (one row a cell) and the Markdown table made from it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.arms import ARMS
from bench.contention import CROWDED_CORES
from bench.metrics import PLACEMENT
from bench.run_folder import RunFolder, RunPlan
from bench.schedule import CellKey
from bench.store import CellRecord
from sglang_eplb_affinity.files import write_atomically

HEADLINE = {"p50_ttft_ms": "P50-TTFT ms", "p90_tpot_ms": "P90-TPOT ms", "p95_itl_ms": "P95-ITL ms", "qps": "QPS"}
PLACEMENT_TITLES = {"balancedness": "balancedness", "gpu_fanout": "GPU fan-out", "node_fanout": "node fan-out"}
CPU_NOTE = "Measured on a CPU with a small model: these speeds say nothing about a GPU."


def tidy(records: Iterable[CellRecord]) -> pd.DataFrame:
    """One row a record: key, validity, metrics, placement, provenance; sorted by concurrency, arm, block."""
    rows = [_row(record) for record in records]
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    order = {name: i for i, name in enumerate(ARMS)}
    frame["_arm"] = frame["arm"].map(order)
    return frame.sort_values(["concurrency", "_arm", "block"], ignore_index=True).drop(columns="_arm")


def _row(record: CellRecord) -> dict[str, Any]:
    key = record.key
    return {
        "block": key.block,
        "arm": key.arm,
        "concurrency": key.concurrency,
        "valid": not record.void,
        "void": "; ".join(record.void),
        "requests": record.requests,
        **record.metrics,
        **record.placement,
        "seed": record.seed,
        "finished": record.finished,
        "commit": record.provenance.get("commit"),
        "hardware": record.provenance.get("hardware"),
        "sglang": record.provenance.get("versions", {}).get("sglang"),
    }


def write_tables(folder: RunFolder, plan: RunPlan) -> pd.DataFrame:
    """Write cells.csv, cells.parquet and table.md of a run; returns the tidy table."""
    latest = folder.store.latest()
    frame = tidy(latest[cell] for cell in plan.cells() if cell in latest)
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    write_atomically(folder.path / "cells.csv", frame.to_csv(index=False).encode())
    write_atomically(folder.path / "cells.parquet", buffer.getvalue())
    missing = [cell for cell in plan.cells() if cell not in latest]
    markdown = render(frame, plan, folder.environment(), missing)
    write_atomically(folder.path / "table.md", markdown.encode())
    return frame


def read_table(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "cells.parquet")


def over_blocks(frame: pd.DataFrame) -> pd.DataFrame:
    """Median over the blocks of the rows that count, one row for each concurrency and arm."""
    valid = frame[frame["valid"]]
    numbers = [c for c in valid.select_dtypes("number").columns if c not in ("block", "seed", "concurrency")]
    return valid.groupby(["concurrency", "arm"], sort=True)[numbers].median().reset_index()


def render(frame: pd.DataFrame, plan: RunPlan, environment: dict[str, Any], missing: Sequence[CellKey] = ()) -> str:
    """table.md: what was measured, latency and throughput, placement, and the rows that do not count."""
    profile = plan.profile
    lines = [f"# {profile.title}", ""]
    lines += [f"- {line}" for line in _facts(plan, environment)]
    if profile.server.engine == "cpu":
        lines += ["", f"**{CPU_NOTE}**"]
    if not frame.empty:
        summary = over_blocks(frame)
        lines += ["", "## Latency and throughput", ""]
        lines += [*_caveats(frame, plan), ""]
        lines += latency_table(frame, summary, plan)
        lines += ["", "## Placement, as the server saw it", "", _PLACEMENT_TEXT, ""]
        lines += placement_table(frame, summary, plan)
    lines += _void_list(frame, missing)
    return "\n".join(lines) + "\n"


def _caveats(frame: pd.DataFrame, plan: RunPlan) -> list[str]:
    lines = [
        f"Median of {plan.blocks} blocks."
        if plan.blocks > 1
        else "One block: a difference between arms cannot be told from noise here."
    ]
    if warning := crowded_warning(frame, plan):
        lines += ["", f"**{warning}**"]
    return lines


def crowded_warning(frame: pd.DataFrame, plan: RunPlan) -> str:
    """One sentence if other processes took cores from the rows of a CPU server, else an empty text."""
    if plan.profile.server.engine != "cpu" or "other_cores" not in frame:
        return ""
    others = frame.loc[frame["valid"], "other_cores"].dropna()
    crowded = int((others > CROWDED_CORES).sum())
    if not crowded:
        return ""
    return (
        f"Other processes used up to {others.max():.1f} of this machine's cores during {crowded} of {len(others)} "
        "rows: the arms' speeds must not be compared."
    )


_PLACEMENT_TEXT = (
    "`before -> after`: the placement that the server started with, on its first window, and the placement in use "
    "during the row, on the row's own traffic (not the traffic it was planned on). Balancedness is mean load over "
    "largest load of a GPU (1 is even); fan-out is the mean number of distinct GPUs or nodes that a token's experts "
    "are on. One figure alone: the placement never changed (measured on the warm-up prompts). Blank: not measured."
)


def _facts(plan: RunPlan, environment: dict[str, Any]) -> list[str]:
    load, profile = plan.profile.load, plan.profile
    versions = environment.get("versions", {})
    prompt = f"{load.exact_input_tokens}" if load.exact_input_tokens else "{} to {}".format(*load.input_tokens)
    rate = f"Poisson arrivals at {load.request_rate:g} requests/s" if load.request_rate else "closed loop"
    return [
        f"Hardware: {environment.get('hardware')}",
        f"SGLang {versions.get('sglang')}, torch {versions.get('torch')}, commit {environment.get('commit')}"
        + (" with uncommitted changes" if environment.get("uncommitted_changes") else ""),
        f"Date: {environment.get('date')}",
        f"Model {profile.server.model}, {profile.server.ranks} ranks; prompts: {plan.prompts}, {prompt} tokens in, "
        f"{load.output_tokens} out; {rate}, sglang.bench_serving",
        f"Command: `{environment.get('command')}`",
    ]


def latency_table(frame: pd.DataFrame, summary: pd.DataFrame, plan: RunPlan) -> list[str]:
    """One line for each concurrency and arm; VOID where no block counts."""
    columns = HEADLINE | ({"other_cores": "cores used by others"} if plan.profile.server.engine == "cpu" else {})
    lines = [_line(["concurrency", "arm", *columns.values()]), _line(["---:", "---"] + ["---:"] * len(columns))]
    for concurrency, arm, row in _rows(frame, summary, plan):
        values = ["VOID"] * len(columns) if row is None else [_number(row.get(name)) for name in columns]
        lines.append(_line([str(concurrency), ARMS[arm].title, *values]))
    return lines


def placement_table(frame: pd.DataFrame, summary: pd.DataFrame, plan: RunPlan) -> list[str]:
    titles = PLACEMENT_TITLES | {"node_fanout": node_title(plan)}
    header = ["concurrency", "arm", "rebalances", "that moved experts", *titles.values()]
    lines = [_line(header), _line(["---:", "---", "---:", "---:"] + ["---:"] * len(PLACEMENT_TITLES))]
    for concurrency, arm, row in _rows(frame, summary, plan):
        if row is None:
            lines.append(_line([str(concurrency), ARMS[arm].title] + ["VOID"] * (len(header) - 2)))
            continue
        counts = [_number(row.get(name), 0) for name in ("rebalances", "rebalances_moved")]
        pairs = [_pair(row.get(f"{name}_initial"), row.get(f"{name}_served")) for name in PLACEMENT]
        lines.append(_line([str(concurrency), ARMS[arm].title, *counts, *pairs]))
    return lines


def node_title(plan: RunPlan) -> str:
    nodes = plan.profile.server.nodes
    return f"node fan-out ({nodes} emulated nodes)" if nodes > 1 else "node fan-out"


def _rows(
    frame: pd.DataFrame, summary: pd.DataFrame, plan: RunPlan
) -> Iterable[tuple[int, str, dict[str, Any] | None]]:
    rows = {(row["concurrency"], row["arm"]): row for row in summary.to_dict("records")}
    measured = set(zip(frame["concurrency"], frame["arm"], strict=True))
    for concurrency in plan.concurrency:
        for arm in plan.arms:
            if (concurrency, arm) in measured:
                yield concurrency, arm, rows.get((concurrency, arm))


def _void_list(frame: pd.DataFrame, missing: Sequence[CellKey]) -> list[str]:
    void = [] if frame.empty else frame[~frame["valid"]].to_dict("records")
    lines = [
        f"- block {row['block']}, concurrency {row['concurrency']}, {ARMS[row['arm']].title}: {row['void']}"
        for row in void
    ]
    lines += [f"- {cell.name}: not measured (the run was interrupted; it goes on where it stopped)" for cell in missing]
    return ["", "## Rows that do not count", "", *lines] if lines else []


def _number(value: Any, digits: int = 2) -> str:
    return "" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def _pair(before: Any, after: Any) -> str:
    first, second = _number(before, 3), _number(after, 3)
    return " -> ".join(filter(None, (first, second)))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
