"""Servers side by side on the same GPUs with flags of their own, without a profile: for a check of their outputs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType

from bench.harness.engine import Engine
from bench.harness.hosts import THIS_HOST, OtherHosts
from bench.harness.ports import free_port
from bench.harness.profile import ServerConfig
from bench.harness.server import HOST, PORT_STEP, Server, ServerFailed, commands_of_hosts
from bench.harness.side_by_side import (
    SIDE_BY_SIDE_ENVIRONMENT,
    SIDE_BY_SIDE_FLAGS,
    start_together,
    stop_together,
)


@dataclass(frozen=True)
class ResidentArm:
    """One server: its name in results, and the flags that make it differ from the others."""

    name: str
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class ResidentServers:
    """All arms of a check, started at the same time; use as a context manager.

    An arm whose server ends while it starts is tried once more when the others are there. One that does not start is
    left out and named in ``failed``; with none left, ServerFailed is raised.
    ``flags`` are common to all arms and must leave memory for them: limit the pool with --max-total-tokens and let
    --mem-fraction-static be high, because a starting server takes what others use for memory that is gone.
    Servers over several ``hosts`` are not paused: this host cannot stop the others' processes.
    """

    def __init__(
        self,
        arms: Sequence[ResidentArm],
        model: Path,
        flags: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        port: int,
        ready_timeout_s: float = 400.0,
        hosts: OtherHosts = THIS_HOST,
    ) -> None:
        common = {**os.environ, **SIDE_BY_SIDE_ENVIRONMENT, **environment}
        self.servers: dict[str, Server] = {}
        self.seconds_to_ready: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for number, arm in enumerate(arms):
            at = port + PORT_STEP * number
            command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--host", HOST]
            command += ["--port", str(at), "--nccl-port", str(free_port()), *SIDE_BY_SIDE_FLAGS, *flags, *arm.flags]
            engine = Engine(str(model), {**common, **arm.environment})
            config = ServerConfig(str(model), 1, other_hosts=hosts.names, dist_init_addr=hosts.dist_init_addr)
            first, *others = commands_of_hosts(config, command, engine, number)
            log = folder / f"server-{arm.name}.log"
            self.servers[arm.name] = Server(first, engine, log, at, ready_timeout_s, others)

    def __enter__(self) -> ResidentServers:
        started = start_together(self.servers, partial(print, flush=True))
        self.seconds_to_ready, self.failed = started.seconds_to_ready, started.failed
        for name in self.failed:
            del self.servers[name]
        if not self.servers:
            raise ServerFailed("; ".join(f"{name}: {why}" for name, why in self.failed.items()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        stop_together(self.servers.values())
