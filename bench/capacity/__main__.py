"""`python -m bench.capacity`: every simulated table of docs/capacity_results.md, and its headline figures."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pandas as pd

from bench.calibration.calibrate import (
    MEASURED,
    Comparison,
    comparison_table,
    fit_all,
    largest_error,
    summary_table,
)
from bench.calibration.fidelity import fidelity, fidelity_table
from bench.calibration.measured import load_measured
from bench.capacity import expert_times
from bench.capacity.by_phase import phase_rows, phase_table
from bench.capacity.decode import decode_rows, decode_table
from bench.capacity.docs import fill
from bench.capacity.replicas import replica_gains
from bench.capacity.small_passes import size_rows, size_table
from bench.capacity.v2 import HEADLINE, V2_MEASURED, fanout_ratio, v2_rows, v2_table
from bench.harness.engine import ROOT
from bench.harness.environment import now, provenance, versions
from bench.harness.output_paths import ResultFolder
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.domain.topology import Topology

PLAN, TEST = "bench/data/tiny_moe_plan.npz", "bench/data/tiny_moe_test.npz"
PAGE, RESULTS = "docs/capacity_results.md", "results/simulate"
DEEPEP = ("results/deepep/h200-x2.json", "results/deepep/h200-x4.json", V2_MEASURED)
FULL, SMALL = ("--layers", "6", "--resamples", "8"), ("--layers", "4", "--resamples", "5")
RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("deepseek-v3-h800", "8,16,32,64,144,320", FULL),
    ("deepseek-v3-h200", "32", SMALL),
    ("deepseek-v3-gb200-nvl72", "36,72,144", SMALL),
    ("qwen3-235b-h200", "8,16,32", SMALL),
    ("gpt-oss-120b-h200", "8", SMALL),
)
DAYS: tuple[tuple[str, str], ...] = (("deepseek-v3-h800", "prefill"), ("deepseek-v3-h800", "decode"))
ADVICE = ("deepseek-v3-h800", "qwen3-235b-h200", "gpt-oss-120b-h200")
PUBLISHED_THROUGHPUT = (("prefill", "32", 52_300), ("decode", "72", 22_300))
HEADLINES = {32: "simulate.deepseek_v3_ep32.tpot_gain_pct", 144: "simulate.deepseek_v3_ep144.tpot_gain_pct"}

out_option = click.option(
    "--out", type=ResultFolder(), default=RESULTS, show_default=True, help="Folder of the results."
)


@click.group()
def main() -> None:
    """Simulated capacity tables."""


@main.command("all")
@out_option
@click.option("--keep", is_flag=True, help="Keep the results that are there already, and make the others.")
def everything(out: Path, keep: bool) -> None:
    """All runs; some minutes on 2 cores."""
    folder = _folder(out)
    began = time.monotonic()
    for preset, gpus, size in RUNS:
        _cli("simulate", *_traces(), "--topology", preset, "--gpus", gpus, *size, "--format", "markdown",
             "--out", f"{out}/{preset}.json", into=folder / f"{preset}.md", keep=keep)  # fmt: skip
    for preset, phase in DAYS:
        into = folder / f"day-{preset}-{phase}.md"
        done = keep and into.is_file()
        _cli("replay", *_traces(), "--topology", preset, "--phase", phase, "--layers", "2",
             "--out", f"{out}/day-{preset}-{phase}.json", "--plots", str(out), into=into, keep=keep)  # fmt: skip
        if not done:
            _thin_day(folder / f"day-{preset}-{phase}.json")
    for preset in ADVICE:
        _cli("recommend", *_traces(), "--topology", preset, "--layers", "3", "--resamples", "4",
             into=folder / f"recommend-{preset}.txt", keep=keep)  # fmt: skip
    if not (keep and (folder / "end-to-end.md").is_file()):
        write_atomically(folder / "end-to-end.md", _end_to_end(folder).encode())
    started = time.monotonic()
    _cli("simulate", *_traces(), "--topology", "deepseek-v3-h800", "--gpus", "320", into=None)
    ep320 = time.monotonic() - started
    rows = _calibration(folder)
    rows_of_trace = fidelity(_own_traces()[0], [Topology(8, 2), Topology(16, 4)])
    write_atomically(folder / "fidelity.md", (fidelity_table(rows_of_trace) + "\n").encode())
    entries = _entries(folder, ep320, largest_error(rows))
    write_atomically(folder / "summary_entries.json", (json.dumps({"entries": entries}, indent=2) + "\n").encode())
    _fill_page(folder)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    click.echo(f"{time.monotonic() - began:.0f} s in all; peak memory of a run {peak:.2f} GiB; EP320 {ep320:.0f} s")


@main.command("replicas")
@out_option
def replicas_command(out: Path) -> None:
    """Gains of many replicas over EPLB at its best redundancy, served with the rule that affinity takes."""
    folder = _folder(out)
    figures = replica_gains(*_own_traces())
    _write_csv(folder / "replicas.csv", pd.DataFrame(figures).drop(columns=["hardware", "unit"]))
    source = provenance()
    entries = [
        {
            "name": figure["name"], "value": figure["gain %"], "lower": figure["lower"], "upper": figure["upper"],
            "unit": figure["unit"], "kind": "simulated", "hardware": figure["hardware"],
            "versions": versions(), "commit": source["commit"], "date": now(),
            "command": "python -m bench.capacity replicas",
        }
        for figure in figures
    ]  # fmt: skip
    text = json.dumps({"entries": entries}, indent=2) + "\n"
    write_atomically(folder / "replicas_summary_entries.json", text.encode())


@main.command("v2")
@out_option
def v2_command(out: Path) -> None:
    """Decode with DeepEP V2 beside V1's low-latency mode; some minutes on 2 cores."""
    folder = _folder(out)
    rows = v2_rows(*_own_traces(), done=click.echo)
    _publish(folder, "deepep-v2", rows, v2_table(rows))
    first, source = rows[0], provenance()
    entry = {
        "name": HEADLINE, "value": first["gain %"], "lower": first["lower"], "upper": first["upper"],
        "unit": "% shorter decode step than EPLB's best, both with DeepEP V2 (constants of 2 GPUs, assumed beyond)",
        "kind": "simulated",
        "hardware": f"simulated {first['GPUs']} x H200 ({first['preset']}), routing fitted to the tiny MoE's recording",
        "versions": versions(), "commit": source["commit"], "date": now(), "command": "python -m bench.capacity v2",
    }  # fmt: skip
    measured = fanout_ratio(load_measured(ROOT / V2_MEASURED))
    text = json.dumps({"entries": [entry, measured]}, indent=2) + "\n"
    write_atomically(folder / "deepep_v2_summary_entries.json", text.encode())


@main.command("decode")
@out_option
def decode_command(out: Path) -> None:
    """Replica choices and redundancies in decode (low latency); some minutes on 2 cores."""
    folder = _folder(out)
    rows = decode_rows(*_own_traces(), done=click.echo)
    _publish(folder, "decode-rules", rows, decode_table(rows))


@main.command("sizes")
@out_option
def sizes_command(out: Path) -> None:
    """One active slot an expert beside all slots, by the size of a decode pass, within a node; some minutes."""
    folder = _folder(out)
    rows = size_rows(*_own_traces(), done=click.echo)
    _publish(folder, "small-passes", rows, size_table(rows))


@main.command("phases")
@out_option
def phases_command(out: Path) -> None:
    """Rules by phase on one map, auto mode over several nodes; some minutes."""
    folder = _folder(out)
    rows = phase_rows(*_own_traces(), done=click.echo)
    _publish(folder, "by-phase", rows, phase_table(rows))


@main.command("calibration")
@out_option
def calibration_command(out: Path) -> None:
    """Only the comparison of the time model with every measured point."""
    click.echo(f"largest error on points that were not fitted: {largest_error(_calibration(ROOT / out)):.1f} %")


@main.command("experts")
@out_option
def experts_command(out: Path) -> None:
    """The time of experts against every measured one, and its entry for the summary."""
    folder = _folder(out)
    times = expert_times.compare(ROOT)
    origin = provenance()
    common = {"versions": versions(), "commit": origin["commit"], "date": now(),
              "command": "python -m bench.capacity experts"}  # fmt: skip
    text = json.dumps({"entries": [expert_times.entry(times, common)]}, indent=2) + "\n"
    write_atomically(folder / "expert-time.md", expert_times.table(times).encode())
    write_atomically(folder / "expert_time_summary_entries.json", text.encode())
    click.echo(expert_times.table(times), nl=False)


@main.command("docs")
@out_option
def docs_command(out: Path) -> None:
    """Put the tables of the last run into docs/capacity_results.md."""
    fill(ROOT / PAGE, ROOT / out)


@main.command("fidelity")
@click.argument("traces", nargs=-1, required=True)
def fidelity_command(traces: Sequence[str]) -> None:
    """Compare recordings with what the routing model draws for them."""
    for name in traces:
        trace = RoutingTrace.load(name)
        click.echo(f"{Path(name).name}: {trace.num_experts} experts, top-{trace.top_k}, {trace.num_tokens} tokens")
        click.echo(fidelity_table(fidelity(trace, [Topology(8, 2), Topology(16, 4)])) + "\n")


def _traces() -> list[str]:
    return ["--trace", PLAN, "--test-trace", TEST]


def _own_traces() -> tuple[RoutingTrace, RoutingTrace]:
    """The tokens planned on, and those held out."""
    return RoutingTrace.load(ROOT / PLAN), RoutingTrace.load(ROOT / TEST)


def _folder(out: Path) -> Path:
    """Made before what takes minutes is computed."""
    folder = ROOT / out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}; name a folder that can be made") from None
    return folder


def _publish(folder: Path, name: str, rows: Sequence[dict[str, Any]], table: str) -> None:
    """Rows as CSV and as the table of the page."""
    _write_csv(folder / f"{name}.csv", pd.DataFrame(rows))
    write_atomically(folder / f"{name}.md", (table + "\n").encode())
    _fill_page(folder)


def _fill_page(folder: Path) -> None:
    """The page shows the project's own results, not those of a trial elsewhere."""
    if folder == ROOT / RESULTS:
        fill(ROOT / PAGE, folder)


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    write_atomically(path, table.to_csv(index=False, float_format="%.3f").encode())


def _cli(*arguments: str, into: Path | None, keep: bool = False) -> None:
    """Run the command as a user would; its output goes to a file (with ``keep`` only if that is not there)."""
    if keep and into is not None and into.is_file():
        return
    command = [sys.executable, "-m", "sglang_eplb_affinity", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(arguments)}: exit code {done.returncode}")
    if into is not None:
        write_atomically(into, done.stdout)


def _calibration(folder: Path) -> list[Comparison]:
    """The comparison with every point (calibration.md), with the published ones, and a line for each source."""
    rows = fit_all([load_measured(ROOT / path) for path in DEEPEP])[1]
    published = [row for row in rows if not row.point.calibration.startswith(f"{MEASURED}-x")]
    for name, text in (
        ("calibration", comparison_table(rows)),
        ("calibration-published", comparison_table(published)),
        ("calibration-summary", summary_table(rows)),
    ):
        write_atomically(folder / f"{name}.md", (text + "\n").encode())
    return rows


def _end_to_end(folder: Path) -> str:
    """Tokens/s of a node of 8 GPUs against the published ones (see the page), without and with perfect overlap."""
    lines = [
        "| phase | published tokens/s a node | simulated without overlap | simulated with perfect two-batch overlap |",
        "|---|---|---|---|",
    ]
    for phase, gpus, published in PUBLISHED_THROUGHPUT:
        cells = []
        for overlap in ("none", "two_batch"):
            path = folder / f"end-to-end-{phase}-{overlap}.json"
            _cli("simulate", *_traces(), "--topology", "deepseek-v3-h100", "--gpus", gpus, "--phase", phase,
                 "--overlap", overlap, "--algorithm", "eplb", "--layers", "3", "--resamples", "2",
                 "--out", str(path), into=None)  # fmt: skip
            rate = 8 * json.loads(path.read_text())["results"][0]["tokens_per_second_per_gpu"]
            path.unlink()
            cells.append(f"{rate:,.0f} ({100 * (rate / published - 1):+.0f} %)")
        lines.append(f"| {phase}, EP{gpus} | {published:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _thin_day(path: Path) -> None:
    """Drop the hourly series of all but the shortest and longest interval: the file is committed."""
    data = json.loads(path.read_text())
    shown = {day["policy"]["every"] for day in data["days"] if day["policy"]["every"] > 0}
    for day in data["days"]:
        if day["policy"]["every"] not in (0, min(shown), max(shown)):
            del day["windows"]
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())


def _entries(folder: Path, ep320: float, error: float) -> list[dict[str, Any]]:
    origin = provenance()
    common = {
        "versions": origin["versions"], "commit": origin["commit"], "date": now(),
        "command": "python -m bench.capacity all",
    }  # fmt: skip

    def entry(
        name: str, value: float, lower: float, upper: float, unit: str, kind: str, hardware: str
    ) -> dict[str, Any]:
        return {"name": name, "value": value, "lower": lower, "upper": upper, "unit": unit, "kind": kind,
                "hardware": hardware, **common}  # fmt: skip

    results = json.loads((folder / "deepseek-v3-h800.json").read_text())["results"]
    found = [
        entry("simulate.calibration_error_pct.max", error, error, error, "%", "simulated",
              "time model against DeepEP's published tables (H800, GB200) and 2 and 4 x H200, points not fitted"),
        entry("simulate.ep320.seconds", ep320, ep320, ep320, "s", "measured", origin["hardware"]),
    ]  # fmt: skip
    for gpus, name in HEADLINES.items():
        gain = next(
            r["gain_pct_over_eplb"] for r in results
            if r["gpus"] == gpus and r["phase"] == "decode" and r["algorithm"] == "affinity"
        )  # fmt: skip
        hardware = f"simulated {gpus} x H800, routing fitted to the tiny MoE's recording"
        found.append(entry(name, gain["value"], gain["lower"], gain["upper"], "%", "simulated", hardware))
    return found


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except (InputError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"error: {message}", err=True)
        raise SystemExit(2) from None
