"""``python -m bench.planner``: the planner's quality and speed beside SGLang's EPLB, as tables in results/planner."""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
from pathlib import Path
from typing import Any, get_args

import click
from tqdm import tqdm

from bench.harness.environment import command_line, describe_environment, now, provenance, versions
from bench.harness.output_paths import ResultFolder
from bench.planner.loop_day import DAY_CASES, day_entries, day_rows
from bench.planner.percentile import PERCENTILE_CASES, percentile_rows
from bench.planner.quality import CASES, CURVE_CASES, Case, Split, drift_rows, floor_rows, quality_rows
from bench.planner.replicas import REPLICA_CASES, plot_replicas, replica_speed_rows
from bench.planner.report import report_text
from bench.planner.rounds import ROUND_CASES, round_rows
from bench.planner.speed import speed_rows, start_up_and_memory
from bench.planner.torch_search import search_rows, workloads
from bench.planner.tried import tried_rows
from bench.planner.upstream import upstream_rebalance, upstream_version
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.planner import warm_up
from sglang_eplb_affinity.planner.config import Effort

PARTS = ("quality", "replicas", "curves", "floor", "drift", "loop", "percentile", "rounds", "tried", "torch", "speed")
OWN_TRACE = "bench/data/tiny_moe_plan.npz,bench/data/tiny_moe_test.npz"
Row = dict[str, Any]


@click.command()
@click.option("--trace", "traces", multiple=True, help=f"FILE or PLAN,TEST; may repeat.  [default: {OWN_TRACE}]")
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="Only these parts.  [default: all]")
@click.option("--case", "labels", multiple=True, help="Only these, as in the tables: 8x2, 8x2-cover8.  [default: all]")
@click.option("--split-tokens", type=click.IntRange(1), help="Split a FILE by blocks of so many tokens, not sequences.")
@click.option("--effort", "efforts", type=click.Choice(get_args(Effort)), multiple=True, help="[default: both]")
@click.option("--seeds", type=int, default=3, show_default=True, help="Planner seeds per case.")
@click.option(
    "--repeats", type=click.IntRange(0), default=7, show_default=True, help="Rounds of the speed tables; 0: none."
)
@click.option("--torch-repeats", type=int, default=1, show_default=True, help="Rounds of the torch comparison.")
@click.option("--floor-layers", type=int, default=2, show_default=True)
@click.option("--floor-scale", type=int, default=10, show_default=True)
@click.option("--out", type=ResultFolder(), default=Path("results/planner"), show_default=True)
def main(
    traces: tuple[str, ...], parts: tuple[str, ...], labels: tuple[str, ...], split_tokens: int | None,
    efforts: tuple[str, ...], seeds: int, repeats: int, torch_repeats: int, floor_layers: int, floor_scale: int,
    out: Path,
) -> None:  # fmt: skip
    """Measure the planner; prints the tables and writes CSV, Markdown and the environment.

    \b
    Example:
      python -m bench.planner --trace my_trace.npz --part quality --out /tmp/planner
    """
    command = command_line("bench.planner")
    splits = [Split.load(text, split_tokens) for text in traces or (OWN_TRACE,)]
    efforts = efforts or get_args(Effort)
    chosen = parts or PARTS
    rebalance = upstream_rebalance()
    environment = describe_environment(command)
    environment["baseline"] = f"SGLang {upstream_version()}" if rebalance else "own EPLB (SGLang is not installed)"
    warm_up()
    tables: dict[str, list[Row]] = {}
    cases = [(split, case) for split in splits for case in _chosen(CASES, labels) if case.fits(split.plan.num_experts)]
    every = dict.fromkeys((*CASES, *REPLICA_CASES, *CURVE_CASES, *ROUND_CASES))
    if not any(case.fits(split.plan.num_experts) for split in splits for case in _chosen(tuple(every), labels)):
        raise InputError(f"--case {', '.join(labels)}: no such case, or it does not fit the trace; omit it to see all")
    if "speed" in chosen:  # first, before anything else has heated up the machine
        if repeats:
            tables["speed"] = speed_rows(rebalance, repeats)
        tables["start"] = start_up_and_memory()
    if "quality" in chosen:
        tables["quality"] = _each("quality", cases, lambda s, c: quality_rows(s, c, rebalance, seeds, efforts))
    if "replicas" in chosen:
        fitting = [(s, c) for s in splits for c in _chosen(REPLICA_CASES, labels) if c.fits(s.plan.num_experts)]
        tables["replicas"] = _each(
            "replicas", fitting, lambda s, c: quality_rows(s, c, rebalance, min(seeds, 2), efforts)
        )
        if repeats:
            tables["replicas_speed"] = replica_speed_rows(repeats)
    if "curves" in chosen:
        tables["curves"] = _each(
            "curves", _curves(splits, labels), lambda s, c: quality_rows(s, c, rebalance, 1, ("fast",))
        )
    if "floor" in chosen:
        tables["floor"] = _each("floor", cases, lambda s, c: floor_rows(s, c, floor_layers, floor_scale))
    if "drift" in chosen:
        drift_cases = [(s, c) for s, c in cases if (c.gpus, c.nodes) == (8, 2) and c.redundant in (0, 8)]
        tables["drift"] = _each("drift", drift_cases, drift_rows)
    if "loop" in chosen:
        fitting = [(s, c) for s in splits for c in _chosen(DAY_CASES, labels) if c.fits(s.plan.num_experts)]
        tables["loop"] = _each("loop", fitting, day_rows)
    if "percentile" in chosen:
        fitting = [(s, c) for s in splits for c in _chosen(PERCENTILE_CASES, labels) if c.fits(s.plan.num_experts)]
        tables["percentile"] = _each("percentile", fitting, percentile_rows)
    if "rounds" in chosen:
        fitting = [(s, c) for s in splits for c in _chosen(ROUND_CASES, labels) if c.fits(s.plan.num_experts)]
        tables["rounds"] = _each("rounds", fitting, round_rows)
    if "tried" in chosen:
        tables["tried"] = _each("tried", cases, lambda s, c: tried_rows(s, c, rebalance))
    if "torch" in chosen:
        tables["torch"] = search_rows(workloads(splits[0].window()), torch_repeats)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        if rows:
            write_atomically(out / f"{name}.csv", _csv(rows).encode())
    if tables.get("replicas"):
        plot_replicas(tables["replicas"], out / "replicas.png")
    text = report_text(tables, environment)
    write_atomically(out / "report.md", text.encode())
    write_atomically(out / "environment.json", (json.dumps(environment, indent=1) + "\n").encode())
    entries = _entries(tables, " ".join(command))
    write_atomically(out / "summary_entries.json", (json.dumps(entries, indent=1) + "\n").encode())
    click.echo(text)


def _chosen(cases: tuple[Case, ...], labels: tuple[str, ...]) -> list[Case]:
    return [case for case in cases if not labels or case.label in labels]


def _curves(splits: list[Split], labels: tuple[str, ...]) -> list[tuple[Split, Case]]:
    return [
        (split, case) for split in splits for case in _chosen(CURVE_CASES, labels) if case.fits(split.plan.num_experts)
    ]


def _each(name: str, cases: list[tuple[Split, Case]], measure: Any) -> list[Row]:
    rows: list[Row] = []
    for split, case in tqdm(cases, desc=name, disable=None):
        rows += measure(split, case)
    return rows


def _csv(rows: list[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return buffer.getvalue()


def _entries(tables: dict[str, list[Row]], command: str) -> list[Row]:
    """Entries for results/summary.json; intervals are the range over planner seeds, or over rounds for times."""
    source = provenance()
    fixed = {
        "kind": "measured", "hardware": source["hardware"], "versions": versions(), "commit": source["commit"],
        "date": now(), "command": command,
    }  # fmt: skip
    entries: list[Row] = []

    def add(name: str, values: list[float], unit: str) -> None:
        interval = {"value": statistics.median(values), "lower": min(values), "upper": max(values)}
        entries.append({"name": name, **interval, "unit": unit, **fixed})

    replicas: dict[str, list[float]] = {}
    for row in tables.get("replicas", []):
        if row["arm"] == "affinity thorough":
            replicas.setdefault(f"planner.replicas.{row['trace']}.{row['case']}", []).append(row["gpu_fanout"])
    for name, values in replicas.items():
        add(f"{name}.gpu_fanout", values, "GPUs per token")
    for row in tables.get("replicas_speed", []):
        if row["arm"].endswith("512 slots"):
            values = [row["ratio_to_288_min"], row["ratio_to_288"], row["ratio_to_288_max"]]
            add("planner.replicas.dsv3_512.time_ratio_to_288", values, "ratio to 288 slots")
    for name, values in day_entries(tables.get("loop", [])).items():
        add(f"loop.day.{name}", values, "ratio to deepseek" if "ratio" in name else "percent")
        entries[-1]["kind"] = "simulated"  # recorded tokens, but their order over the day is drawn
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in tables.get("quality", []):
        if row["arm"] == "affinity thorough":
            groups.setdefault((row["trace"], row["case"]), []).append(row)
    for (trace, case), rows in groups.items():
        for name in ("gpu_fanout_ratio", "node_fanout_ratio"):
            if name == "gpu_fanout_ratio" or rows[0]["nodes"] > 1:
                add(f"planner.{trace}.{case}.{name}", [row[name] for row in rows], "ratio to deepseek")
        load = [row["load_max_over_mean"] / (row["load_max_over_mean"] - row["load_difference"]) for row in rows]
        add(f"planner.{trace}.{case}.load_ratio", load, "ratio to deepseek")
    for row in tables.get("speed", []):
        if row["arm"] == "affinity fast, full":
            values = [row["ratio_to_eplb_min"], row["ratio_to_eplb"], row["ratio_to_eplb_max"]]
            add("planner.dsv3.full_time_ratio_to_eplb", values, "ratio to SGLang deepseek")
        if "incremental" in row["arm"]:
            values = [row["ratio_to_full_min"], row["ratio_to_full"], row["ratio_to_full_max"]]
            add("planner.dsv3.incremental_time_ratio_to_full", values, "ratio to full plan")
    return entries


def run() -> None:
    """Bad input exits with code 2 and one line."""
    try:
        main(prog_name="python -m bench.planner", standalone_mode=False)
    except (InputError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"error: {' '.join(message.split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    run()
