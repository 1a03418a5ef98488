"""Several servers side by side on the same GPUs, loaded one at a time in balanced order.

Interleaving arms by restarting servers costs a minute or more a start. Arms that fit the memory together are started
once, at the same time, and take turns; the others' processes are paused meanwhile, so they disturb the arm under load
neither on the GPUs nor on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.figures.server_log import pass_rates
from bench.gpu.serving_process import ServingProcess
from bench.harness.engine import Engine
from bench.harness.hosts import THIS_HOST, OtherHosts
from bench.harness.process import last_error, scrub_file
from bench.harness.profile import ServerConfig
from bench.harness.schedule import williams_rows
from bench.harness.server import HOST, PORT_STEP, Server, ServerFailed, commands_of_hosts
from bench.harness.side_by_side import (
    SIDE_BY_SIDE_ENVIRONMENT,
    SIDE_BY_SIDE_FLAGS,
    free_port,
    give_turn,
    start_together,
    stop_together,
)


@dataclass(frozen=True)
class ResidentArm:
    """One server: its name in results, and the flags that make it differ from the others."""

    name: str
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """One closed loop of sglang.bench_serving on random token ids; ``streams`` only where latencies are read.

    A stream costs the client and the detokenizer a message a token, which hides the GPUs' throughput.
    """

    name: str
    requests: int
    concurrency: int
    input_tokens: int
    output_tokens: int
    streams: bool = True

    def arguments(self, model: Path, port: int, seed: int, out: Path) -> list[str]:
        arguments = ["--backend", "sglang", "--host", HOST, "--port", str(port), "--model", str(model)]
        arguments += ["--dataset-name", "random-ids", "--num-prompts", str(self.requests), "--tokenize-prompt"]
        arguments += ["--random-input-len", str(self.input_tokens), "--random-output-len", str(self.output_tokens)]
        arguments += ["--random-range-ratio", "1.0", "--max-concurrency", str(self.concurrency), "--seed", str(seed)]
        arguments += ["--warmup-requests", "0", "--disable-tqdm", "--output-file", str(out)]
        return arguments if self.streams else [*arguments, "--disable-stream"]

    def shortened(self, factor: float) -> Load:
        """The same load with fewer requests, for warming up; never fewer than run at once."""
        return replace(self, requests=max(self.concurrency, round(self.requests * factor)))


class ResidentServers:
    """All arms of a comparison, started at the same time; use as a context manager.

    An arm whose server ends while it starts is tried once more when the others are there. One that does not start is
    left out and named in ``failed``; with none left, ServerFailed is raised.
    ``flags`` are common to all arms and must leave memory for them: limit the pool with --max-total-tokens and let
    --mem-fraction-static be high, because a starting server takes what others use for memory that is gone. Large dummy
    weights take some GB more while they are drawn; ``stagger_s`` between two starts keeps these peaks apart.
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
        stagger_s: float = 0.0,
        hosts: OtherHosts = THIS_HOST,
    ) -> None:
        self._model, self._folder = model, folder
        self._environment = {**os.environ, **SIDE_BY_SIDE_ENVIRONMENT, **environment}
        self.servers: dict[str, Server] = {}
        self.seconds_to_ready: dict[str, float] = {}
        self.failed: dict[str, str] = {}
        self._stagger_s = stagger_s
        folder.mkdir(parents=True, exist_ok=True)
        for number, arm in enumerate(arms):
            at = port + PORT_STEP * number
            command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--host", HOST]
            command += ["--port", str(at), "--nccl-port", str(free_port()), *SIDE_BY_SIDE_FLAGS, *flags, *arm.flags]
            engine = Engine(str(model), {**self._environment, **arm.environment})
            config = ServerConfig(str(model), 1, other_hosts=hosts.names, dist_init_addr=hosts.dist_init_addr)
            first, *others = commands_of_hosts(config, command, engine, number)
            log = folder / f"server-{arm.name}.log"
            self.servers[arm.name] = Server(first, engine, log, at, ready_timeout_s, others)

    def __enter__(self) -> ResidentServers:
        started = start_together(self.servers, partial(print, flush=True), self._stagger_s)
        self.seconds_to_ready, self.failed = started.seconds_to_ready, started.failed
        for name in self.failed:
            del self.servers[name]
        if not self.servers:
            raise ServerFailed("; ".join(f"{name}: {why}" for name, why in self.failed.items()))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        stop_together(self.servers.values())

    def logs(self) -> dict[str, str]:
        """What the servers have logged so far."""
        return {name: server.log.read_text(errors="replace") for name, server in self.servers.items()}

    def run(
        self,
        loads: Sequence[Load],
        blocks: int,
        timeout_s: float,
        warm_up: float = 0.25,
        arms_of: Mapping[str, Sequence[str]] | None = None,
        client: ServingProcess | None = None,
        first_block: int = 0,
    ) -> list[dict[str, Any]]:
        """Every load on every arm, ``blocks`` times, arms in Williams order within a block.

        ``arms_of``: for loads that only some arms are to run, those arms, by the load's name. ``client``: a load
        generator that was started while the servers were; without one it starts now, which takes ten seconds.
        ``first_block``: the number of the first, where an earlier sitting did others.
        Returns bench_serving's rows with ``arm``, ``load``, ``block`` and the server's :func:`pass_rates` added; block
        -1 is the warm-up. What was not done after ``timeout_s`` is missing. Raises ServerFailed if the client could not
        run at all.
        """
        order = self._order(list(loads), range(first_block, first_block + blocks), warm_up, arms_of)
        log = self._folder / "client.log"
        with ServingProcess(log, self._environment) if client is None else nullcontext(client) as client:
            results = self._run(order, timeout_s, client)
        scrub_file(client.log)
        if not results:
            raise ServerFailed(f"no load was completed: {last_error(client.log, 'no log')}")
        return results

    def _order(
        self, loads: list[Load], blocks: range, warm_up: float, arms_of: Mapping[str, Sequence[str]] | None = None
    ) -> list[tuple[int, str, Load]]:
        only = arms_of or {}
        wanted = {load.name: [n for n in self.servers if n in only.get(load.name, self.servers)] for load in loads}
        rows = {name: williams_rows(len(arms)) for name, arms in wanted.items()}
        order = []
        if warm_up:
            order = [(-1, name, load.shortened(warm_up)) for load in loads for name in wanted[load.name]]
        for block in blocks:
            for load in loads if block % 2 == 0 else loads[::-1]:
                of_load = rows[load.name]
                order += [(block, wanted[load.name][i], load) for i in of_load[block % len(of_load)]]
        return order

    def _run(
        self, order: list[tuple[int, str, Load]], timeout_s: float, client: ServingProcess
    ) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        results = []
        try:
            client.wait_until_ready(timeout_s)
        except RuntimeError as error:
            raise ServerFailed(str(error)) from None
        for number, (block, name, load) in enumerate(order):
            if time.monotonic() > deadline:
                break
            out = self._folder / f"load-{number:03}.jsonl"
            out.unlink(missing_ok=True)
            # The same requests for all arms of a block. A load that fails leaves no row; the others go on.
            try:
                began = time.monotonic()
                log = self.servers[name].log
                logged = log.stat().st_size  # what is there is of other loads
                give_turn(self.servers, name)
                client.begin(load.arguments(self._model, self.servers[name].port, 1000 + block, out))
                client.wait(max(deadline - time.monotonic(), 0))
                row = json.loads(out.read_text().splitlines()[-1])
                with log.open("rb") as of_server:
                    of_server.seek(logged)
                    rates = pass_rates(of_server.read().decode(errors="replace"))
                results.append({"arm": name, "load": load.name, "block": block, **row, **rates})
                print(f"{name} {load.name} block {block}: {time.monotonic() - began:.1f} s", flush=True)
            except (RuntimeError, OSError) as error:
                print(f"{name} {load.name} block {block}: {error}", flush=True)
                if self.servers[name].ended:  # without one arm there is nothing to compare with
                    break
            out.unlink(missing_ok=True)
        return results


def by_block(rows: Sequence[Mapping[str, Any]], arm: str, load: str, metric: str) -> dict[int, float]:
    """One metric of one arm's measured blocks that have it, for bench.figures.stats.ratio_by_block."""
    return {
        int(row["block"]): float(row[metric])
        for row in rows
        if row["arm"] == arm and row["load"] == load and row["block"] >= 0 and metric in row
    }


def incomplete(rows: Sequence[Mapping[str, Any]], loads: Sequence[Load]) -> list[str]:
    """What makes rows void: measured loads whose requests did not all complete."""
    requests = {load.name: load.requests for load in loads}
    return [
        f"{row['arm']}, {row['load']}, block {row['block']}: {row['completed']} of {requests[row['load']]} completed"
        for row in rows
        if row["block"] >= 0 and row["completed"] != requests[row["load"]]
    ]
