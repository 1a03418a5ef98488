"""One SGLang server in its own process, with its log in the run's folder."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from bench.figures.rebalance_log import LogSummary, parse_log
from bench.harness.arms import Arm, map_flags
from bench.harness.engine import ROOT, Engine
from bench.harness.process import last_error, pause_group, resume_group, scrub_file, start_group, stop_group
from bench.harness.profile import ServerConfig

HOST = "127.0.0.1"
PORT_STEP = 25  # a server with data-parallel attention takes a dozen ports that follow from its first


_INTERVAL = "--eplb-rebalance-num-iterations"


class ServerFailed(RuntimeError):
    """The server ended or was not ready in time; the message is the one line that says why."""


class ServerEnded(ServerFailed):
    """It ended while it started. Beside others one may have been short of memory for a moment."""


def server_command(
    config: ServerConfig, arm: Arm, model: str, place: int = 0, served_map: Path | None = None
) -> list[str]:
    """The command of one arm. Arms differ only in ``arm.flags`` and, if they use EPLB, ``config.eplb_flags``.

    Of servers side by side each has another ``place``, and with it ports of its own. ``served_map``: what an arm with
    EPLB serves, without rebalances (see :func:`bench.harness.arms.map_flags`).
    """
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    command += ["--host", HOST, "--port", str(config.port + PORT_STEP * place), *config.flags]
    if arm.uses_eplb:
        command += [*config.eplb_flags, *(["--eplb-affinity-nodes", str(config.nodes)] if config.nodes > 1 else [])]
    if config.plan_trace:
        return [*command, *map_flags(arm, served_map)]
    # Recording slows the passes that it is on in, and is not what this arm is about.
    if arm.only_observed and config.engine != "cpu" and _INTERVAL in config.eplb_flags:
        interval = int(config.eplb_flags[config.eplb_flags.index(_INTERVAL) + 1])
        command += ["--expert-affinity-record-last-passes", str(max(1, interval // 10))]
    return [*command, *arm.flags]  # of a flag that is given twice the last counts


def commands_of_hosts(config: ServerConfig, command: Sequence[str], engine: Engine, place: int = 0) -> list[list[str]]:
    """The command of each host of a server; the first is this one, the others are reached through the remote shell.

    They get the variables that ``engine`` adds to this process's environment.
    """
    if not config.other_hosts:
        return [list(command)]
    host, port = config.dist_init_addr.rsplit(":", 1)
    nodes = [
        "--nnodes",
        str(1 + len(config.other_hosts)),
        "--dist-init-addr",
        f"{host}:{int(port) + PORT_STEP * place}",
    ]
    variables = [f"{k}={v}" for k, v in sorted(engine.environment.items()) if os.environ.get(k) != v]
    first, *others = [[*command, *nodes, "--node-rank", str(rank)] for rank in range(1 + len(config.other_hosts))]
    remote = [f"cd {shlex.quote(str(ROOT))} && exec env {shlex.join([*variables, *other])}" for other in others]
    return [first, *([*config.remote_shell, h, text] for h, text in zip(config.other_hosts, remote, strict=True))]


@dataclass
class Server:
    """Use as a context manager: started and ready inside, its whole process group gone outside."""

    command: Sequence[str]
    engine: Engine
    log: Path
    port: int
    ready_timeout_s: float
    followers: Sequence[Sequence[str]] = ()  # commands that start its other hosts
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    paused: bool = field(default=False, init=False)
    log_start: int = field(default=0, init=False)
    _following: list[subprocess.Popen[bytes]] = field(default_factory=list, init=False)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Server:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, self.port))
            except OSError:
                raise ServerFailed(f"port {self.port} is in use; choose another with --port") from None
        self.log_start = self.log.stat().st_size if self.log.is_file() else 0
        self.paused = False
        self.process = start_group(self.command, self.log, self.engine.environment)
        try:
            for number, follower in enumerate(self.followers, 1):
                log = self.log.with_name(f"{self.log.stem}-host{number}.log")
                self._following.append(start_group(follower, log, self.engine.environment))
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process is not None:
            stop_group(self.process)
            self.process = None
            scrub_file(self.log)
        while self._following:
            stop_group(self._following.pop())
        for number in range(1, len(self.followers) + 1):
            scrub_file(self.log.with_name(f"{self.log.stem}-host{number}.log"))

    def pause(self) -> None:
        """Stop its processes, if all of them are on this host; it keeps its memory."""
        if self.process is not None and not self.followers:
            pause_group(self.process)
            self.paused = True

    def resume(self) -> None:
        if self.process is not None:
            resume_group(self.process)
            self.paused = False

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def ended(self) -> bool:
        """It was started, and is over without having been stopped."""
        return self.process is not None and self.process.poll() is not None

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.ready_timeout_s
        while time.monotonic() < deadline:
            if not self.alive:
                raise ServerEnded(f"server ended while starting: {last_error(self.log, 'its log is empty')}")
            if self.healthy():
                return
            time.sleep(0.5)
        raise ServerFailed(f"server not ready after {self.ready_timeout_s:.0f} s")

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def post(self, path: str, timeout_s: float = 60.0) -> None:
        """POST without a body; raises OSError (urllib's errors are) when the server refuses or is gone."""
        request = urllib.request.Request(f"{self.url}{path}", data=b"", method="POST")
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            response.read()

    def log_size(self) -> int:
        return self.log.stat().st_size if self.log.is_file() else 0

    def log_text(self, start: int | None = None) -> str:
        """The log since byte ``start``; None: since this server was started."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            file.seek(self.log_start if start is None else start)
            return file.read().decode("utf-8", "replace")

    def summary(self, start: int | None = None) -> LogSummary:
        """Rebalances since byte ``start`` of the log; None: since this server was started."""
        return parse_log(self.log_text(start))
