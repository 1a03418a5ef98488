"""The study's tables for the page, and its entries for results/summary.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from bench.requests.study import Verdict, decision, verdicts
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically

COLUMNS = (
    "case", "phase", "remote copies to GPUs / nodes", "load", "queue", "step ms", "gain", "gain within the rule",
    "gain if all links and GPUs were level", "same prompt met again",
)  # fmt: skip
HEAD = (
    "The fastest row that does not look at experts -> the fastest dealt by experts; docs/request_routing.md says what "
    "each column means. Copies are per token: of tokens in prefill, of (token, expert) in decode."
)
ENTRY_CASE = ("olmoe", 8, 2, "decode", "planned, normal", "nearest, band 2%")


def load_results(folder: Path) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Rows and environment of each trace; raises InputError where there are none."""
    found = {}
    for file in sorted(folder.glob("*.csv")):
        about = file.with_suffix(".json")
        if not about.is_file():
            raise InputError(f"{about}: missing; `python -m bench.requests run` writes it")
        rows = [{str(key): value for key, value in row.items()} for row in pd.read_csv(file).to_dict("records")]
        found[file.stem] = (rows, json.loads(about.read_text()))
    if not found:
        raise InputError(f"{folder}: no results; run `python -m bench.requests run` first")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for each case and phase the fastest without a look at experts, and the fastest dealt by experts."""
    ordered = sorted(rows, key=lambda row: (row["gpus"], row["nodes"], row["redundant"]))
    out = [_cells(found, rows) for found in verdicts(ordered)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, *out)]
    return "\n".join([lines[0], "|" + "---|" * len(COLUMNS), *lines[1:]])


def _cells(found: Verdict, rows: list[dict[str, Any]]) -> list[str]:
    base, near = found.base, found.any
    level = min(
        row["level_step_ms"] for row in rows
        if row["dealer"].startswith("nearest") and all(row[key] == base[key] for key in ("trace", "case", "phase"))
    )  # fmt: skip

    def pair(name: str, digits: int) -> str:
        return f"{base[name]:.{digits}f} -> {near[name]:.{digits}f}"

    gpus, nodes = pair("remote_gpu_copies", 2), pair("remote_node_copies", 2)
    return [
        base["case"], base["phase"], gpus if base["nodes"] == 1 else f"{gpus} / {nodes}",
        pair("load_max_over_mean", 3), pair("queue_max_over_mean", 3), pair("step_ms", 1),
        f"{Verdict.gain(near, base):+.1f} %", "none" if found.best is None else f"{found.gain_pct:+.1f} %",
        f"{100 * (1 - level / base['level_step_ms']):+.1f} %", pair("repeats_hit", 2),
    ]  # fmt: skip


def write_tables(folder: Path) -> None:
    """NAME.md beside each NAME.csv."""
    for name, (rows, _) in load_results(folder).items():
        text = f"# {name}, simulated\n\n{HEAD}\n\n{table(rows)}\n"
        write_atomically(folder / f"{name}.md", text.encode())


def entries(folder: Path) -> list[dict[str, Any]]:
    """The ratio of copies on OLMoE, and the decision over all traces (1 go, 0 no go)."""
    results = load_results(folder)
    rows = [row for of_trace, _ in results.values() for row in of_trace]
    about = next(iter(results.values()))[1] if "olmoe" not in results else results["olmoe"][1]
    fixed = {"versions": about["versions"], "commit": about["commit"], "date": about["date"], "kind": "simulated"}
    made = float(decision(verdicts(rows)))
    names = ", ".join(results)
    found = [{
        "name": "requests.decision", "value": made, "lower": made, "upper": made, "unit": "1 go, 0 no go",
        "hardware": f"simulated 2 to 32 GPUs, recorded routing of {names}",
        "command": "python -m bench.requests report",
        **fixed,
    }]  # fmt: skip
    if "olmoe" in results:
        ratios = _ratios(results["olmoe"][0])
        if ratios:
            found.append({
                "name": "requests.olmoe_8x2.remote_copies_ratio", "value": ratios[0], "lower": min(ratios),
                "upper": max(ratios), "unit": "low-latency copies to the other node, by experts / round robin",
                "hardware": "simulated 8 GPUs on 2 nodes, OLMoE-1B-7B's routing; interval: few, many replicas",
                "command": about["command"], **fixed,
            })  # fmt: skip
    return found


def _ratios(rows: list[dict[str, Any]]) -> list[float]:
    """Of the planner's normal-mode map in decode: few redundant experts first, then more."""
    _, gpus, nodes, phase, used, dealer = ENTRY_CASE
    frame = pd.DataFrame(rows)
    case = frame[(frame.gpus == gpus) & (frame.nodes == nodes) & (frame.phase == phase) & (frame["map"] == used)]
    near = case[case.dealer == dealer].set_index("redundant").remote_node_copies
    turn = case[case.dealer == "round robin"].set_index("redundant").remote_node_copies
    return [float(ratio) for ratio in (near / turn).sort_index()]
