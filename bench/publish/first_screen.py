"""What a run says, in less than a screen: what was compared, the placements, and whether a speed differs from noise."""

from __future__ import annotations

import pandas as pd

from bench.figures.compare import compare
from bench.harness.arms import ARMS
from bench.harness.run_folder import RunPlan
from bench.publish.sections import number, row

_PLACEMENT = {"balancedness": "balancedness", "gpu_fanout": "GPUs a token visits", "node_fanout": "nodes it visits"}
_SPEEDS = {"p90_tpot_ms": "P90-TPOT", "full_prefill_ms": "a full prefill pass", "decode_step_ms": "a decode step"}
_MEANING = (
    "Every server got the same requests and did the same work; they differ only in which GPU (rank) holds which "
    "experts. Fewer GPUs and nodes a token visits are fewer copies to send; balancedness is mean over largest load of "
    "a GPU, 1 is even. Affinity should visit fewer than vanilla at about its balancedness."
)
_CPU = "Speeds are not compared here: those of a CPU with a small model say nothing about a GPU."


def first_screen(frame: pd.DataFrame, plan: RunPlan) -> list[str]:
    """Lines of Markdown from the tidy table of all loads; nothing without a row that counts."""
    valid = frame[frame["valid"]] if not frame.empty else frame
    if valid.empty:
        return ["No row counts; the reasons are at the end."]
    lines = [_MEANING, "", *_placement_table(valid, plan), ""]
    lines += [_CPU] if plan.profile.server.engine == "cpu" else _speeds(frame)
    void = int((~frame["valid"]).sum())
    counted = f"{len(valid)} rows count" + (f", {void} are void (the reasons are at the end)" if void else "")
    return [*lines, "", f"{counted}; {plan.blocks} block{'s' if plan.blocks > 1 else ''}."]


def _placement_table(valid: pd.DataFrame, plan: RunPlan) -> list[str]:
    """In use during the rows where it changed, else the one that never did; median over the rows."""
    titles = {n: t for n, t in _PLACEMENT.items() if n != "node_fanout" or plan.profile.server.nodes > 1}
    lines = [row(["server", *titles.values()]), row(["---"] + ["---:"] * len(titles))]
    for arm in plan.arms:
        own = valid[valid["arm"] == arm]
        if own.empty:
            continue
        cells = []
        for name in titles:
            columns = [own[c].dropna() for c in (f"{name}_served", f"{name}_initial") if c in own]
            values = next((found for found in columns if len(found)), None)
            cells.append("" if values is None else number(values.median(), 3))
        lines.append(row([ARMS[arm].title, *cells]))
    return lines


def _speeds(frame: pd.DataFrame) -> list[str]:
    """Each arm against vanilla at the largest concurrency of each load."""
    lines = []
    for load, rows in frame.groupby("load", sort=False):
        largest = rows[rows["concurrency"] == rows["concurrency"].max()]
        metrics = [name for name in _SPEEDS if name in largest and largest[name].notna().any()]
        for found in compare(largest, "vanilla", metrics).to_dict("records"):
            of = f"load {load}, " if load else ""
            name = f"{ARMS[found['arm']].title}, {_SPEEDS[found['metric']]} ({of}{found['concurrency']} concurrent)"
            lines.append(f"- {name}: {_verdict(found)}")
    return lines or ["Nothing was measured beside vanilla EPLB, so no speed can be compared."]


def _verdict(found: dict[str, float]) -> str:
    """The ratio to vanilla in words; below 1 is faster."""
    ratio, lower, upper = found["ratio"], found["lower"], found["upper"]
    text = f"{ratio:.3f} of vanilla's"
    if pd.isna(lower):
        return f"{text}; one block, so it cannot be told from noise"
    told = "less" if upper < 1 else "more" if lower > 1 else "not told from no difference"
    return f"{text} ({lower:.3f} to {upper:.3f}): {told}"
