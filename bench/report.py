"""Everything that is made from a run's store: tables, plots, notebook and HTML page."""

from __future__ import annotations

import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bench import plots
from bench.compare import compare
from bench.engine import ROOT
from bench.process import scrub
from bench.run_folder import RunFolder, RunPlan
from bench.store import latest_records
from bench.table import CPU_NOTE, HEADLINE, crowded_warning, node_title, read_table, write_tables
from sglang_eplb_affinity.files import write_atomically

NOTEBOOK = Path(__file__).parent / "notebooks" / "report.py"
BASELINE = "vanilla"


@dataclass(frozen=True)
class RunData:
    """What the notebook shows. ``note`` goes under every plot of a run whose speeds must not be generalised."""

    cells: pd.DataFrame
    rebalances: pd.DataFrame
    ratios: pd.DataFrame
    markdown: str
    note: str
    node_title: str  # says so where nodes are emulated


def load_run(path: str | os.PathLike[str]) -> RunData:
    """The tables of a run's folder; raises InputError when it is not one."""
    folder = RunFolder(Path(path))
    plan = folder.plan()
    cells = read_table(folder.path)
    cpu = plan.profile.server.engine == "cpu"
    return RunData(
        cells=cells,
        rebalances=rebalance_table(folder),
        ratios=compare(cells, BASELINE, list(HEADLINE)),
        markdown=(folder.path / "table.md").read_text(encoding="utf-8"),
        note=" ".join(filter(None, (CPU_NOTE, crowded_warning(cells, plan)))) if cpu else "",
        node_title=node_title(plan),
    )


def rebalance_table(folder: RunFolder) -> pd.DataFrame:
    """One row for each rebalance of the cells that count, in order of time."""
    rows: list[dict[str, Any]] = []
    for record in sorted(latest_records(folder.store.records()).values(), key=lambda record: record.finished):
        if not record.void:
            rows += [{**asdict(record.key), **asdict(rebalance)} for rebalance in record.rebalances]
    columns = ["arm", "block", "concurrency", "result", "moved_experts", "balancedness_before", "gpu_fanout_before"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def build_report(folder: RunFolder, plan: RunPlan) -> None:
    """Write the tables and, when a cell was measured, the plots, the executed notebook and its HTML page."""
    if write_tables(folder, plan).empty:
        return
    write_plots(folder)
    execute_notebook(folder)


def write_plots(folder: RunFolder) -> None:
    run = load_run(folder.path)
    target = folder.path / "plots"
    target.mkdir(exist_ok=True)
    figures = {
        "latency": plots.latency_plot(run.cells, run.note),
        "ratio_to_vanilla": plots.ratio_plot(run.ratios, run.note),
        "placement": plots.placement_plot(run.cells, run.node_title),
        "rebalances": plots.rebalance_plot(run.rebalances),
    }
    for name, figure in figures.items():
        write_atomically(target / f"{name}.png", plots.png(figure))


def execute_notebook(folder: RunFolder) -> None:
    """Run bench/notebooks/report.py on this run's folder; leaves report.ipynb and report.html there."""
    import jupytext
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

    notebook = jupytext.read(NOTEBOOK)
    # The kernel starts in the run's folder, so the notebook names no folder of this machine.
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder.path)}}
    )
    environment = {**os.environ, "PYTHONPATH": python_path}
    client.execute(env=environment, stderr=subprocess.DEVNULL)  # its errors come back as exceptions
    write_atomically(folder.path / "report.ipynb", scrub(jupytext.writes(notebook, fmt="ipynb")).encode())
    html, _ = HTMLExporter().from_notebook_node(notebook)
    write_atomically(folder.path / "report.html", scrub(html).encode())
