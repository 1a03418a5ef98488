"""Servers beside each other on the same devices: they start together and take turns, the others paused meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import methodcaller
from pathlib import Path

from bench.harness.server import Server, ServerEnded, ServerFailed

# Servers side by side are paused while another has its turn; their watchdogs must not take that for a hang.
SIDE_BY_SIDE_FLAGS = ("--watchdog-timeout", "7200")
SIDE_BY_SIDE_ENVIRONMENT = {
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "7200",
    # While others load, the GPUs' free memory differs; SGLang takes that for a stranger's process and does not start.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false",
    # uvicorn kills a tokenizer worker that does not answer in time: one that still imports beside many others, or that
    # was paused while it was asked. It would be started anew in the middle of a row.
    "SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "7200",
}
# What a server still does after its last answer (a pass that was launched ahead, the rest of a rebalance) is over by
# then. Paused in the middle of a collective, its kernel on one GPU would wait for its peer, and keep that GPU busy.
SETTLE_SECONDS = 0.4
HOLD_SECONDS = 300.0


@dataclass
class Started:
    """Of each server the seconds until it was ready, or the line that says why it is not."""

    seconds_to_ready: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def start_together(servers: Mapping[str, Server], say: Callable[[str], None], stagger_s: float = 0.0) -> Started:
    """Start all at the same time, each ``stagger_s`` after the one before.

    One that ends while it starts may have been short of memory that others needed for a moment: it is tried once more
    when the others are there. One that was not ready in time would take that time again, and stays out.
    """
    started, ended = Started(), []

    def start(name: str, delay: float) -> None:
        time.sleep(delay)
        began = time.monotonic()
        try:
            servers[name].__enter__()
            started.seconds_to_ready[name] = round(time.monotonic() - began, 1)
        except (ServerFailed, OSError) as error:
            started.failed[name] = str(error)
            if isinstance(error, ServerEnded):
                ended.append(name)

    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(start, servers, [place * stagger_s for place in range(len(servers))]))
    if started.seconds_to_ready:
        for name in [name for name in servers if name in ended]:
            say(f"{name}: {started.failed.pop(name)}; started again")
            start(name, 0)
    return started


def stop_together(servers: Iterable[Server]) -> None:
    """Stop all at the same time; the time that takes is one server's."""
    servers = list(servers)
    with ThreadPoolExecutor(max(len(servers), 1)) as pool:
        list(pool.map(methodcaller("stop"), servers))


def give_turn(servers: Mapping[str, Server], name: str) -> None:
    """Let one of the servers beside each other run and pause the others.

    An idle SGLang server launches no kernel, but its schedulers poll: a core each, which is a lot for a server whose
    passes wait for the CPU. ``name`` of none of them: all are paused.
    """
    others = [server for other, server in servers.items() if other != name and not server.paused]
    if others:
        time.sleep(SETTLE_SECONDS)
    for server in others:
        server.pause()
    if name in servers:
        servers[name].resume()


def wait_for_file(path: Path) -> None:
    """Return once ``path`` exists, or after HOLD_SECONDS, whatever it waits for being over by then."""
    deadline = time.monotonic() + HOLD_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
