"""The servers as rich draws them: a panel each where they fit side by side, else a row each."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sglang_eplb_affinity.monitor.gpus import Gpu
from sglang_eplb_affinity.monitor.history import PlacementHistory, ServerHistory
from sglang_eplb_affinity.monitor.limits import Alert
from sglang_eplb_affinity.monitor.reading import FIGURES, JUDGED, JUDGED_FIGURES, Placement, Reading
from sglang_eplb_affinity.monitor.sparkline import sparkline
from sglang_eplb_affinity.monitor.units import age, bytes_text, number, seconds_text

PANEL_WIDTH, SPARK_WIDTH, ROUNDS_SHOWN = 66, 24, 5
NAMES = {
    "balancedness": "balancedness",
    "load": "load (max/mean)",
    "gpu_fanout": "GPUs a token",
    "node_fanout": "nodes a token",
    "cost": "plan's cost",
}
STYLES = {"applied": "green", "failed": "bold red", "skipped": "dim"}


def screen(
    servers: Sequence[ServerHistory], gpus: Sequence[Gpu], alerts: Sequence[Alert], width: int, footer: str = ""
) -> RenderableType:
    """``width``: of the terminal, in characters."""
    parts: list[RenderableType] = []
    if len(servers) == 1 or len(servers) * PANEL_WIDTH <= width:
        grid = Table.grid(expand=True)
        for _ in servers:
            grid.add_column(ratio=1)
        grid.add_row(*(_panel(server, alerts) for server in servers))
        parts.append(grid)
    else:
        parts.append(_rows(servers, alerts))
        parts += [Text(server.error, style="bold red") for server in servers if server.error is not None]
    if gpus:
        parts.append(_gpus(gpus))
    parts += [Text(f"ALERT {alert}", style="bold red") for alert in alerts]
    if footer:
        parts.append(Text(footer, style="dim"))
    return Group(*parts)


def _panel(server: ServerHistory, alerts: Sequence[Alert]) -> Panel:
    parts: list[RenderableType] = []
    if server.error is not None:
        parts.append(Text(server.error, style="bold red"))
    if server.latest is not None:
        for placement in server.latest.placements:
            parts += _placement(placement, server.placements[placement.dp_rank])
        parts.append(_latencies(server))
    style = "red" if server.error or any(alert.url == server.url for alert in alerts) else "none"
    model = server.latest.model.rsplit("/", 1)[-1] if server.latest is not None else ""
    return Panel(Group(*parts), title=Text(f"{server.url} {model}".strip()), title_align="left", border_style=style)


def _placement(placement: Placement, history: PlacementHistory) -> list[RenderableType]:
    title = "" if placement.dp_rank is None else f"dp_rank {placement.dp_rank}"
    figures = Table(box=None, expand=True, pad_edge=False)
    for heading in (title, "in force", "before", "start"):
        figures.add_column(heading, justify="left" if heading == title else "right", no_wrap=True)
    figures.add_column("round by round", no_wrap=True)
    for name in FIGURES:
        maps = placement.figures.get(name, {})
        cells = [number(maps.get(of)) for of in ("after", "before", "contiguous")]
        figures.add_row(NAMES[name], *cells, sparkline(history.values[name], SPARK_WIDTH))
    parts: list[RenderableType] = [figures]
    if placement.judged:
        parts.append(_judged(placement))
    counts = ", ".join(f"{count} {result}" for result, count in placement.rounds.items())
    moved = f"{placement.moved_experts} experts, {bytes_text(placement.moved_bytes)}"
    ages = f"last round {age(placement.last_round)}, map changed {age(placement.last_commit)}"
    parts += [Text(f"rounds  {counts}"), Text(f"moved   {moved}"), Text(f"        {ages}")]
    return [*parts, *_rounds(history)]


def _judged(placement: Placement) -> Table:
    table = Table(box=None, expand=True, pad_edge=False)
    table.add_column("on the last window", no_wrap=True)
    for of in JUDGED:
        table.add_column(of.replace("_", " "), justify="right", no_wrap=True)
    for name in JUDGED_FIGURES:
        table.add_row(NAMES[name], *(number(placement.judged.get(of, {}).get(name)) for of in JUDGED))
    table.add_row("regret", "", number(placement.regret), "", "")
    return table


def _rounds(history: PlacementHistory) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for record in list(history.rounds)[-ROUNDS_SHOWN:][::-1]:
        at, result = record.get("time"), str(record["result"])
        line = Text(f"{time.strftime('%H:%M:%S', time.localtime(at)) if at else '':8} ")
        line.append(f"{result:9}", style=STYLES.get(result, "none"))
        if record.get("moved_experts"):
            line.append(f" {record['moved_experts']} experts, {bytes_text(record.get('moved_bytes') or 0)}")
        if record.get("seconds") is not None:
            line.append(f" in {seconds_text(record['seconds'])}")
        if record.get("reason"):
            line.append(f" {record['reason']}", style="dim")
        lines.append(line)
    return lines


def _latencies(server: ServerHistory) -> Table:
    reading = server.latest
    assert reading is not None
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("TTFT P99 ", seconds_text(reading.ttft_p99), sparkline(server.ttft, SPARK_WIDTH))
    table.add_row("TPOT mean", seconds_text(reading.tpot_mean), sparkline(server.tpot, SPARK_WIDTH))
    table.add_row("requests ", _requests(reading), "")
    return table


def _requests(reading: Reading) -> str:
    return f"{number(reading.running, 0)} running, {number(reading.queued, 0)} queued"


def _rows(servers: Sequence[ServerHistory], alerts: Sequence[Alert]) -> Table:
    table = Table(expand=True, box=None)
    for heading in ("server", "balanced", "GPUs", "nodes", "delivered", "rounds", "moved", "TTFT P99", "TPOT"):
        table.add_column(heading, justify="left" if heading == "server" else "right", overflow="fold")
    for server in servers:
        if server.error is not None or server.latest is None:
            continue
        style = "red" if any(alert.url == server.url for alert in alerts) else "none"
        for placement in server.latest.placements:
            rank = "" if placement.dp_rank is None else f" dp_rank {placement.dp_rank}"
            rounds = sum(placement.rounds.values())
            failed = placement.rounds.get("failed", 0)
            table.add_row(
                server.url.split("://")[-1] + rank,
                *(number(placement.in_force(name), 2) for name in FIGURES),
                number(placement.judged.get("delivered", {}).get("load"), 2),
                f"{rounds}, {failed} failed" if failed else str(rounds),
                bytes_text(placement.moved_bytes),
                seconds_text(server.latest.ttft_p99),
                seconds_text(server.latest.tpot_mean),
                style=style,
            )
    return table


def _gpus(gpus: Sequence[Gpu]) -> Text:
    used = ", ".join(f"{gpu.index}: {number(gpu.utilization, 0)} %" for gpu in gpus)
    return Text(f"GPU utilisation on this machine  {used}")
