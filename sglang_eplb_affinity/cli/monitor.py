"""``monitor``: placement and latencies of running servers, live in the terminal or once for scripts."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from sglang_eplb_affinity.domain.errors import missing_package

if TYPE_CHECKING:
    from sglang_eplb_affinity.monitor.history import ServerHistory
    from sglang_eplb_affinity.monitor.limits import Alert, Limit

TIMEOUT = 10.0


@click.command("monitor")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option("--once", is_flag=True, help="One reading, and end; as text always so where stdout is no terminal.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: one object on a line for each reading.",
)
@click.option(
    "--alert",
    "alerts",
    multiple=True,
    metavar="NAME=VALUE",
    help="End with exit code 1 if a server is past the limit: balancedness below it; gpu_fanout, node_fanout, "
    "delivered_load, regret, failed_rounds, ttft_p99 or tpot_mean (seconds) above it. Several.",
)
@click.option("--interval", type=click.FloatRange(min=0.2), default=2.0, show_default=True,
              help="Seconds between readings.")  # fmt: skip
def monitor_command(urls: tuple[str, ...], once: bool, form: str, alerts: tuple[str, ...], interval: float) -> None:
    """What placement does on running servers: balancedness and fan-outs, rounds, what plans promised and delivered,
    TTFT and TPOT, and this machine's GPUs. Servers need --enable-metrics.

    Latencies are of the last minute, and with --once of all requests since the server started. Exit codes: 0, 1 if an
    --alert was seen, 2 if a server could not be read with --once (or none could at the start).

    \b
    Examples:
      python -m sglang_eplb_affinity monitor http://node0:30000 http://node1:30000
      python -m sglang_eplb_affinity monitor node0:30000 --once --format json --alert balancedness=0.8
    """
    _needs("prometheus_client")
    if form == "text":
        _needs("rich")
    from sglang_eplb_affinity.monitor.fetch import base_url
    from sglang_eplb_affinity.monitor.history import ServerHistory
    from sglang_eplb_affinity.monitor.limits import Limit

    limits = [Limit.parse(text) for text in alerts]
    servers = [ServerHistory(url) for url in dict.fromkeys(map(base_url, urls))]
    if once or (form == "text" and not sys.stdout.isatty()):
        sys.exit(_once(servers, limits, form))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the screen is given back
    sys.exit(_live(servers, limits, form, interval))


def _needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise missing_package("monitor", module, "monitor")


def _read(servers: Sequence[ServerHistory], limits: Sequence[Limit]) -> tuple[list[Alert], list[str]]:
    """One reading of each into its history; alerts, and what a limit has no value for."""
    from sglang_eplb_affinity.monitor.fetch import read_all
    from sglang_eplb_affinity.monitor.limits import check_all

    for server, found in zip(servers, read_all([server.url for server in servers], TIMEOUT), strict=True):
        server.add(found)
    return check_all(limits, [server.latest for server in servers if server.latest is not None and not server.error])


def _once(servers: Sequence[ServerHistory], limits: Sequence[Limit], form: str) -> int:
    alerts, missing = _read(servers, limits)
    errors = [server.error for server in servers if server.error is not None]
    if form == "json":
        click.echo(_json(servers, alerts))
    elif len(errors) < len(servers):
        from rich.console import Console

        from sglang_eplb_affinity.monitor.gpus import read_gpus
        from sglang_eplb_affinity.monitor.view import screen

        console = Console()
        console.print(screen(servers, read_gpus(), alerts, console.width))
    for line in [*(f"error: {error}" for error in errors), *(f"note: {line}" for line in missing)]:
        click.echo(line, err=True)
    return 2 if errors else 1 if alerts else 0


def _live(servers: Sequence[ServerHistory], limits: Sequence[Limit], form: str, interval: float) -> int:
    """Until Ctrl-C."""
    alerts, _ = _read(servers, limits)
    if all(server.error for server in servers):
        for server in servers:
            click.echo(f"error: {server.error}", err=True)
        return 2
    seen = bool(alerts)
    try:
        if form == "json":
            while True:
                click.echo(_json(servers, alerts))
                sys.stdout.flush()
                time.sleep(interval)
                alerts, _ = _read(servers, limits)
                seen = seen or bool(alerts)
        from rich.console import Console
        from rich.live import Live

        from sglang_eplb_affinity.monitor.gpus import read_gpus
        from sglang_eplb_affinity.monitor.view import screen

        console = Console()
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                footer = f"{time.strftime('%H:%M:%S')}, every {interval:g} s; Ctrl-C ends"
                live.update(screen(servers, read_gpus(), alerts, console.width, footer), refresh=True)
                time.sleep(interval)
                alerts, _ = _read(servers, limits)
                seen = seen or bool(alerts)
    except KeyboardInterrupt:
        return int(seen)


def _json(servers: Sequence[ServerHistory], alerts: Sequence[Alert]) -> str:
    from sglang_eplb_affinity.monitor.gpus import read_gpus

    listed = [
        server.latest.to_json()
        if server.latest is not None and server.error is None
        else {"url": server.url, "error": server.error}
        for server in servers
    ]
    gpus = [gpu.to_json() for gpu in read_gpus()]
    return json.dumps({"servers": listed, "gpus": gpus, "alerts": [alert.to_json() for alert in alerts]})
