"""The tidy table of a run (one row a cell) and the Markdown table made from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bench.harness.arms import ARMS
from bench.harness.contention import CROWDED_CORES
from bench.harness.links import Link
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.schedule import CellKey
from bench.harness.store import CellRecord
from bench.publish.first_screen import first_screen
from bench.publish.loads import load_sections
from bench.publish.sections import (
    CONDITIONS,
    HEADLINE,
    PASSES,
    TAILS,
    metric_table,
    noise_text,
    number,
    original_layout,
    ratio_table,
)
from bench.publish.sections import row as row_line
from sglang_eplb_affinity.domain.files import write_atomically

PLACEMENT_TITLES = {
    "balancedness": "balancedness",
    "gpu_fanout": "GPU fan-out",
    "remote_gpu_copies": "copies to other GPUs",
    "node_fanout": "node fan-out",
    "remote_node_copies": "copies to other nodes",
}
_TEXTS = ("arm", "load", "void", "finished", "commit", "hardware", "sglang", "sitting", "link", "kind")
CPU_NOTE = "Measured on a CPU with a small model: these speeds say nothing about a GPU."


def tidy(records: Iterable[CellRecord]) -> pd.DataFrame:
    """One row a record: key, validity, metrics, placement, provenance; sorted by load, concurrency, arm, block."""
    rows = [_row(record) for record in records]
    frame = pd.DataFrame(rows)
    if frame.empty:
        return frame
    order = {name: i for i, name in enumerate(ARMS)}
    frame["_arm"] = frame["arm"].map(order)
    return frame.sort_values(["load", "concurrency", "_arm", "block"], ignore_index=True).drop(columns="_arm")


def _row(record: CellRecord) -> dict[str, Any]:
    key = record.key
    return {
        "block": key.block,
        "arm": key.arm,
        "concurrency": key.concurrency,
        "load": key.load,
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
        "sitting": record.provenance.get("sitting"),
        "link": record.provenance.get("link"),
        "kind": record.provenance.get("kind", "measured"),
    }


def write_tables(folder: RunFolder, plan: RunPlan) -> pd.DataFrame:
    """Write cells.csv and table.md of a run; returns the tidy table."""
    latest = folder.store.latest()
    frame = tidy(latest[cell] for cell in plan.cells() if cell in latest)
    write_atomically(folder.path / "cells.csv", frame.to_csv(index=False).encode())
    missing = [cell for cell in plan.cells() if cell not in latest]
    markdown = render(frame, plan, folder.environment(), missing)
    write_atomically(folder.path / "table.md", markdown.encode())
    return frame


def main_load(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the profile's main load."""
    return frame if frame.empty else frame[frame["load"] == ""]


def read_table(folder: Path) -> pd.DataFrame:
    """The rows of the main load."""
    frame = pd.read_csv(folder / "cells.csv", dtype=dict.fromkeys(_TEXTS, "str"), keep_default_na=True)
    return main_load(frame.fillna({name: "" for name in ("load", "void") if name in frame}))


def over_blocks(frame: pd.DataFrame) -> pd.DataFrame:
    """Median over the blocks of the rows that count, one row for each concurrency and arm."""
    valid = frame[frame["valid"]]
    numbers = [c for c in valid.select_dtypes("number").columns if c not in ("block", "seed", "concurrency")]
    return valid.groupby(["concurrency", "arm"], sort=True)[numbers].median().reset_index()


def render(frame: pd.DataFrame, plan: RunPlan, environment: dict[str, Any], missing: Sequence[CellKey] = ()) -> str:
    """table.md: what was measured, latency and throughput, placement, and the rows that do not count."""
    profile, link = plan.profile, Link.of(plan.profile)
    emulated = f" ({link.title})" if link.emulated else ""
    lines = [f"# {profile.title}", "", *first_screen(frame, plan), "", "## What was measured", ""]
    lines += [f"- {line}" for line in _facts(plan, environment)]
    if profile.server.engine == "cpu":
        lines += ["", f"**{CPU_NOTE}**"]
    if link.emulated:
        lines += ["", f"**{emulated_note(link)}**"]
    every, frame = frame, main_load(frame)
    if not frame.empty:
        summary = over_blocks(frame)
        rows = list(_rows(frame, summary, plan))
        lines += ["", f"## Latency and throughput{emulated}", "", *_caveats(frame, plan), "", _steady_text(plan), ""]
        lines += _held_back_text(plan)
        lines += latency_table(frame, summary, plan)
        by_cell = {(level, arm): values for level, arm, values in rows if values is not None}
        lines += ["", f"## In the layout of the original proposal: no EPLB/vanilla/affinity{emulated}", ""]
        lines += original_layout(by_cell, plan.concurrency, profile.server.engine != "cpu")
        if ratios := ratio_table(frame):
            lines += ["", f"## Ratios{emulated}", "", _RATIO_TEXT, "", *ratios, "", noise_text(frame)]
        if passes := metric_table(rows, PASSES):
            ratios = ratio_table(frame, {"full_prefill_ms": PASSES["full_prefill_ms"]})
            lines += ["", f"## Full prefill passes{emulated}", "", _PASSES_TEXT, "", *passes, "", *ratios]
        if tails := metric_table(rows, TAILS):
            lines += ["", f"## Tails, stalls and goodput{emulated}", "", _targets_text(plan), "", *tails]
        if profile.server.plan_trace:
            lines += ["", f"## Placement{emulated}", "", _ONE_MAP_TEXT, ""]
        else:
            lines += ["", f"## Placement, as the server saw it{emulated}", "", _PLACEMENT_TEXT, ""]
        lines += placement_table(frame, summary, plan)
        if conditions := metric_table(rows, CONDITIONS):
            lines += ["", f"## Conditions of the rows{emulated}", "", _CONDITIONS_TEXT, "", *conditions]
    lines += load_sections(every, plan, emulated)
    lines += _void_list(every, missing)
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


def emulated_note(link: Link) -> str:
    return (
        "Emulated: after every dispatch and combine each GPU waits as long as its bytes to other nodes would take on a "
        f"link of {link.gb_per_s} GB/s. The nodes are GPUs of one host. Every speed here is of this emulated link."
    )


def _steady_text(plan: RunPlan) -> str:
    in_flight = "when the wanted number of requests is in flight and has first tokens"
    begin = "when the first request is done" if plan.profile.load.request_rate else in_flight
    return f"All but the counts is of the steady part of each row: from {begin}, until no further request starts."


_RATIO_TEXT = (
    "Geometric mean over blocks of the paired ratio, 95 % interval (Student's t on the logarithms); bold where it "
    "differs from 1 after Holm's adjustment over the table (p < 0.05). Below 1 is better for "
    "latencies, above 1 for QPS."
)
_PASSES_TEXT = (
    "From the server's log: the time from one full prefill pass of a scheduler to its next, median over a row. Such "
    "passes wait for the GPUs, so they tell placements apart where latencies of requests are too noisy."
)
_CONDITIONS_TEXT = (
    "What could make a row lie: requests in flight as the client and as the schedulers saw them, requests that waited "
    "for room, and how busy and late the load generator was. Rows beyond the limits are void."
)


def _held_back_text(plan: RunPlan) -> list[str]:
    held = {level: plan.profile.server.held_back(level) for level in plan.profile.load.concurrency}
    waits = ", ".join(f"{number:g} of {level}" for level, number in held.items() if number)
    return [f"The server's flags let up to {waits} requests wait, which TTFT includes.", ""] if waits else []


def _targets_text(plan: RunPlan) -> str:
    load = plan.profile.load
    slo = [f"{n} at most {v:g} ms" for n, v in (("TTFT", load.slo_ttft_ms), ("TPOT", load.slo_tpot_ms)) if v]
    goodput = f"Goodput: requests with {' and '.join(slo)}. " if slo else ""
    return (
        f"{goodput}A stall: tokens more than {load.stall_ms:g} ms and 4 median ITLs late; "
        "requests that stall together count once."
    )


_ONE_MAP_TEXT = (
    "Computed on the replayed trace, not measured: each server kept the one map that it was given, planned on another "
    "trace. Balancedness is mean load over largest load of a GPU (1 is even); fan-out is the mean number of distinct "
    "GPUs or nodes that a token's experts are on."
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
    rate = f"Poisson arrivals at {load.request_rate:g} requests/s" if load.request_rate else "closed loop"
    return [
        f"Hardware: {environment.get('hardware')}",
        f"SGLang {versions.get('sglang')}, torch {versions.get('torch')}, commit {environment.get('commit')}"
        + (" with uncommitted changes" if environment.get("uncommitted_changes") else ""),
        f"Date: {environment.get('date')}",
        f"Model {profile.server.model}, {profile.server.ranks} ranks; prompts: {plan.prompts}, {load.lengths}; "
        f"{rate}, sglang.bench_serving",
        f"Command: `{environment.get('command')}`",
        *([f"Link: **{link.title}**"] if (link := Link.of(profile)).emulated else []),
    ]


def latency_table(frame: pd.DataFrame, summary: pd.DataFrame, plan: RunPlan) -> list[str]:
    """One line for each concurrency and arm; VOID where no block counts."""
    columns = HEADLINE | ({"other_cores": "cores used by others"} if plan.profile.server.engine == "cpu" else {})
    lines = [row_line(["concurrency", "arm", *columns.values()]), row_line(["---:", "---"] + ["---:"] * len(columns))]
    for concurrency, arm, row in _rows(frame, summary, plan):
        values = ["VOID"] * len(columns) if row is None else [number(row.get(name)) for name in columns]
        lines.append(row_line([str(concurrency), ARMS[arm].title, *values]))
    return lines


def placement_table(frame: pd.DataFrame, summary: pd.DataFrame, plan: RunPlan) -> list[str]:
    titles = placement_titles(plan)
    header = ["concurrency", "arm", "rebalances", "that moved experts", *titles.values()]
    lines = [row_line(header), row_line(["---:", "---", "---:", "---:"] + ["---:"] * len(titles))]
    for concurrency, arm, row in _rows(frame, summary, plan):
        if row is None:
            lines.append(row_line([str(concurrency), ARMS[arm].title] + ["VOID"] * (len(header) - 2)))
            continue
        counts = [number(row.get(name), 0) for name in ("rebalances", "rebalances_moved")]
        pairs = [_pair(row.get(f"{name}_initial"), row.get(f"{name}_served")) for name in titles]
        lines.append(row_line([str(concurrency), ARMS[arm].title, *counts, *pairs]))
    return lines


def placement_titles(plan: RunPlan) -> dict[str, str]:
    """Titles by metric; nodes only where there are several, and then emulated, since the profile's host is one."""
    nodes = plan.profile.server.nodes
    if nodes < 2:
        return {name: title for name, title in PLACEMENT_TITLES.items() if "node" not in name}
    note = f" ({nodes} emulated nodes)"
    return {name: title + note * ("node" in name) for name, title in PLACEMENT_TITLES.items()}


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
    lines = []
    for row in [] if frame.empty else frame[~frame["valid"]].to_dict("records"):
        load = f"load {row['load']}, " if row["load"] else ""
        where = f"block {row['block']}, {load}concurrency {row['concurrency']}, {ARMS[row['arm']].title}"
        lines.append(f"- {where}: {row['void']}")
    lines += [f"- {cell.name}: not measured (the run was interrupted; it goes on where it stopped)" for cell in missing]
    return ["", "## Rows that do not count", "", *lines] if lines else []


def _pair(before: Any, after: Any) -> str:
    first, second = number(before, 3), number(after, 3)
    return " -> ".join(filter(None, (first, second)))
