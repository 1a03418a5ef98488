"""Everything that is made from a run's store: tables, plots, notebook and HTML page."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bench.figures.compare import compare
from bench.figures.placements import PlacementView, placement_views
from bench.harness.engine import ROOT
from bench.harness.links import Link
from bench.harness.probe import load_window
from bench.harness.process import scrub
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.store import latest_records
from bench.publish import plots, routing_plots
from bench.publish.routing_plots import RowTimeline, row_timelines
from bench.publish.sections import HEADLINE
from bench.publish.table import (
    CPU_NOTE,
    crowded_warning,
    emulated_note,
    main_load,
    placement_titles,
    read_table,
    write_tables,
)
from sglang_eplb_affinity.domain.files import write_atomically

NOTEBOOK = Path(__file__).parent / "notebooks" / "report.py"
BASELINE = "vanilla"
_OPTIONAL_PLOTS = {"ratio_to_vanilla", "coactivation", "gpu_load", "fanout"}


@dataclass(frozen=True)
class RunData:
    """What the notebook shows. ``note`` goes under every plot of a run whose speeds must not be generalised."""

    cells: pd.DataFrame
    rebalances: pd.DataFrame
    ratios: pd.DataFrame
    markdown: str
    note: str
    placement_titles: dict[str, str]  # say so where nodes are emulated
    views: list[PlacementView]  # empty if the run recorded no routing
    timelines: list[RowTimeline]
    caveats: list[str]
    on_cpu: bool

    @property
    def opening(self) -> str:
        """The first screen of table.md, without its title."""
        return self.markdown.split("\n## ", 1)[0].split("\n", 1)[1].strip()


def load_run(path: str | os.PathLike[str]) -> RunData:
    """The tables of a run's folder; raises InputError when it is not one."""
    folder = RunFolder(Path(path))
    plan = folder.plan()
    cells = read_table(folder.path)
    cpu, link = plan.profile.server.engine == "cpu", Link.of(plan.profile)
    notes = [CPU_NOTE, crowded_warning(cells, plan)] if cpu else []
    routing = folder.path / "routing.npz"
    return RunData(
        cells=cells,
        rebalances=rebalance_table(folder),
        ratios=compare(cells, BASELINE, list(HEADLINE)),
        markdown=(folder.path / "table.md").read_text(encoding="utf-8"),
        note=" ".join(filter(None, [*notes, emulated_note(link) if link.emulated else ""])),
        placement_titles=placement_titles(plan),
        views=placement_views(load_window(routing), plan.profile.server, plan.arms) if routing.is_file() else [],
        timelines=row_timelines(folder, plan),
        caveats=caveats(plan),
        on_cpu=cpu,
    )


def caveats(plan: RunPlan) -> list[str]:
    """What a run does not say, from what it was: hardware, link, routing, blocks."""
    server, link = plan.profile.server, Link.of(plan.profile)
    found = [CPU_NOTE] if server.engine == "cpu" else []
    if link.emulated:
        found.append(emulated_note(link))
    if server.nodes > 1 and server.engine == "cpu":
        found.append("The nodes are ranks of one machine: fan-out over nodes is counted, nothing crosses a network.")
    if server.engine != "cpu" and server.ranks <= 4:
        found.append(f"{server.ranks} GPUs: a token's experts reach most of them whatever the placement.")
    if any("replay:" in flag for flag in server.flags):
        found.append("Routing is replayed from one trace: maps fit it better than traffic that drifts.")
    if plan.blocks < 3:
        blocks = "one block has no interval" if plan.blocks == 1 else "two blocks have wide intervals"
        found.append(f"{blocks.capitalize()}: a difference cannot be told from noise.")
    return [*found, "Other traffic, models and networks gain other amounts: measure your own."]


def rebalance_table(folder: RunFolder) -> pd.DataFrame:
    """One row for each rebalance of the cells that count, in order of time."""
    rows: list[dict[str, Any]] = []
    for record in sorted(latest_records(folder.store.records()).values(), key=lambda record: record.finished):
        if not record.void and not record.key.load:
            rows += [{**asdict(record.key), **asdict(rebalance)} for rebalance in record.rebalances]
    columns = ["arm", "block", "concurrency", "result", "moved_experts", "balancedness_before", "gpu_fanout_before"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def build_report(folder: RunFolder, plan: RunPlan) -> None:
    """Write the tables and, when a cell was measured, the plots, the executed notebook and its HTML page."""
    if main_load(write_tables(folder, plan)).empty:
        return
    write_plots(folder)
    execute_notebook(folder)


def write_plots(folder: RunFolder) -> None:
    target = folder.path / "plots"
    target.mkdir(exist_ok=True)
    figures = plot_figures(load_run(folder.path))
    for name, figure in figures.items():
        write_atomically(target / f"{name}.png", plots.png(figure))
    for name in _OPTIONAL_PLOTS - figures.keys():  # what an earlier report drew would be taken for this one's
        (target / f"{name}.png").unlink(missing_ok=True)


def plot_figures(run: RunData) -> dict[str, Figure]:
    """Every plot of a run, by the name of its file."""
    figures = {
        "latency": plots.latency_plot(run.cells, run.note),
        "placement": plots.placement_plot(run.cells, run.placement_titles, run.note),
        "rebalances": plots.rebalance_plot(run.rebalances, run.note),
        "rebalances_over_itl": routing_plots.timeline_plot(run.timelines, run.note),
    }
    if len(run.ratios):
        figures["ratio_to_vanilla"] = plots.ratio_plot(run.ratios, run.note)
    if run.views:
        figures["coactivation"] = routing_plots.coactivation_plot(run.views, shown_layers(run.views), run.note)
        figures["gpu_load"] = routing_plots.load_plot(run.views, run.note)
        figures["fanout"] = routing_plots.fanout_plot(run.views, run.note)
    return figures


def shown_layers(views: Sequence[PlacementView]) -> list[int]:
    """The first, a middle and the last layer."""
    last = len(views[0].coactivation) - 1
    return sorted({0, last // 2, last})


def execute_notebook(folder: RunFolder) -> None:
    """Run bench/publish/notebooks/report.py on this run's folder; leaves report.ipynb and report.html there."""
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
