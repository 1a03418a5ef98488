"""Measures the cells of a run that are not there yet."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from bench.harness.arms import ARMS
from bench.harness.contention import ContentionMeter
from bench.harness.engine import CACHE, Engine, prepare_engine
from bench.harness.environment import now
from bench.harness.links import link_environment
from bench.harness.load import LoadClient, LoadResult, own_environment
from bench.harness.pinning import Cores, pin_process, pin_server
from bench.harness.ports import free_port
from bench.harness.probe import DUMP_FOLDER_VARIABLE, Placement, ProbeFailed, probe_placement
from bench.harness.record import Measured, record_cell
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.schedule import CellKey, Sitting
from bench.harness.server import PORT_STEP, Server, commands_of_hosts, server_command
from bench.harness.sharegpt import Turn
from bench.harness.side_by_side import (
    SIDE_BY_SIDE_ENVIRONMENT,
    SIDE_BY_SIDE_FLAGS,
    give_turn,
    start_together,
    stop_together,
    wait_for_file,
)
from bench.harness.sitting import WARM_UP, Budget, Preparation, WorkKey, measure_cell, warm_up_server
from bench.harness.static_maps import placement_on_replay, write_maps
from bench.harness.store import CellRecord
from bench.harness.workload import Workload


class Progress:
    """What a run tells while it goes on; this one tells nothing."""

    def say(self, line: str) -> None: ...

    def request(self, cell: CellKey, done: int, total: int) -> None: ...

    def cell(self, record: CellRecord) -> None: ...


@dataclass
class Arms:
    """The servers of a sitting: those that run, why others do not, and the placements of those without EPLB."""

    servers: dict[str, Server] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    probed: dict[str, Placement | None] = field(default_factory=dict)
    on_replay: dict[str, Placement | None] = field(default_factory=dict)


@dataclass
class Runner:
    folder: RunFolder
    plan: RunPlan
    turns: list[Turn]
    progress: Progress
    seconds: float | None = None
    hold: Path | None = None  # servers are started, and nothing is measured before this file is there

    def run(self) -> bool:
        """Measure every sitting that has cells left; a cell is in the store as soon as it is measured.

        False when ``seconds`` were over before everything was measured.
        """
        left = self.folder.left(self.plan)
        if not left:
            return True
        budget = Budget(self.seconds)
        self.progress.say("preparing the model and the requests")
        profile = self.plan.profile
        engine = prepare_engine(profile.server)
        engine.environment[DUMP_FOLDER_VARIABLE] = str(CACHE / "dumps" / self.folder.name)
        engine.environment.update(link_environment(profile.link, profile.server, engine.environment))
        prepared = Preparation(self.plan, self.turns, engine.model, CACHE / "prompts" / self.folder.name)
        log = self.folder.path / "server" / "client.log"
        with LoadClient(own_environment(engine.environment), log) as client:
            client.start()
            return all(self._sit(sitting, engine, prepared, client, budget) for sitting in left)

    def _sit(self, sitting: Sitting, engine: Engine, prepared: Preparation, client: LoadClient, budget: Budget) -> bool:
        """One start of servers. One that fails voids the cells that it could not serve; the run goes on."""
        if not budget.in_time():
            return False
        stamp = f"{now()}-{os.getpid()}"
        with ExitStack() as stack:
            arms = self._start(sitting, engine, stack)
            self._settle(arms, client)
            works = {block: prepared.workloads(block) for block in {cell.block for cell in sitting.cells}}
            self._ready(sitting, arms, works[sitting.cells[0].block], prepared, client, budget)
            for cell in sitting.cells:
                if not budget.has_room_for(cell):
                    return False
                work = works[cell.block][cell.load, cell.concurrency]
                measured = Measured(cell, work, stamp, arms.probed.get(cell.arm))
                server = arms.servers.get(cell.arm)
                if server is None or not server.alive:
                    why = arms.failed.get(cell.arm, "server ended before this cell")
                    self._record(measured, LoadResult({}, None, why), server, 0, None)
                    continue
                give_turn(arms.servers, cell.arm)
                meter, start = ContentionMeter(), server.log_size()
                show = partial(self._show, cell, work.requests)
                with budget.measuring(cell):
                    result = measure_cell(cell, work, server, client, self.plan, engine.model, self.folder, show)
                self._record(measured, result, server, start, meter.other_cores())
        return True

    def _start(self, sitting: Sitting, engine: Engine, stack: ExitStack) -> Arms:
        """Start the sitting's servers, all at once."""
        config, arms = self.plan.profile.server, Arms()
        together = len(sitting.arms) > 1
        if together:
            engine = replace(engine, environment={**engine.environment, **SIDE_BY_SIDE_ENVIRONMENT})
        maps = write_maps(config, sitting.arms, engine.model, self.folder.path / "maps")
        for place, name in enumerate(sitting.arms):
            served_map = maps.get(name)
            command = server_command(config, ARMS[name], engine.model, place, served_map)
            if together and not config.other_hosts:  # each looks for free ports by itself, and two find the same
                command += ["--nccl-port", str(free_port()), *SIDE_BY_SIDE_FLAGS]
            own = replace(engine, environment={**engine.environment, **dict(ARMS[name].environment)})
            command, *others = commands_of_hosts(config, command, own, place)
            log = self.folder.path / "server" / f"{name if together else sitting.name}.log"
            port = config.port + PORT_STEP * place
            arms.servers[name] = Server(command, own, log, port, config.ready_timeout_s, others)
        titles = ", ".join(ARMS[name].title for name in sitting.arms)
        self.progress.say(f"{sitting.name}: starting {'servers' if together else 'the server'} ({titles})")

        stack.callback(stop_together, list(arms.servers.values()))
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:  # compiles and computes for some seconds, which the start takes anyway
            figures = {
                name: pool.submit(placement_on_replay, config, ARMS[name], maps.get(name))
                for name in (sitting.arms if config.plan_trace else ())
            }
            arms.failed = start_together(arms.servers, self.progress.say, config.stagger_s).failed
            arms.on_replay = {name: found.result() for name, found in figures.items()}
        arms.servers = {name: server for name, server in arms.servers.items() if name not in arms.failed}
        self.progress.say(f"{sitting.name}: {len(arms.servers)} ready after {time.monotonic() - began:.0f} s")
        return arms

    def _settle(self, arms: Arms, client: LoadClient) -> None:
        """Give everyone cores of their own, and wait for whoever measures something else first."""
        config = self.plan.profile.server
        cores = Cores.of(sorted(os.sched_getaffinity(0)), config.ranks) if config.pinned else None
        if cores is not None and client.process_id is not None:
            pin_process(client.process_id, cores.client)
        for server in arms.servers.values():
            if cores is None or server.process is None:
                continue
            if pin_server(server.process.pid, cores) != config.ranks:
                self.progress.say(f"not all of the {config.ranks} schedulers were found, so not all are pinned")
        if config.pinned and cores is None:
            self.progress.say("too few cores to pin schedulers, servers and load generator apart")
        if self.hold is not None:
            give_turn(arms.servers, "")
            self.progress.say(f"ready; waiting for {self.hold.name}")
            wait_for_file(self.hold)

    def _ready(
        self,
        sitting: Sitting,
        arms: Arms,
        works: dict[WorkKey, Workload],
        prepared: Preparation,
        client: LoadClient,
        budget: Budget,
    ) -> None:
        """Warm the servers up, in turn, and measure the placement of those that will never log it."""
        for name, server in arms.servers.items():
            self.progress.say(f"{sitting.name}: warming up {ARMS[name].title}")
            give_turn(arms.servers, name)
            try:
                warm_up_server(server, ARMS[name], works, self.plan, prepared.model, client, budget, self.folder)
                if self.plan.profile.server.plan_trace:
                    arms.probed[name] = arms.on_replay.get(name)
                elif ARMS[name].recorded and not ARMS[name].uses_eplb:
                    dumps = CACHE / "dumps" / self.folder.name
                    keep = self.folder.path / "routing.npz"
                    work, config = works["", WARM_UP], self.plan.profile.server
                    arms.probed[name] = probe_placement(server, work, config, dumps, keep)
            except ProbeFailed as error:
                self.progress.say(f"placement not measured: {error}")
            except OSError as error:
                arms.failed[name] = str(error)
        arms.servers = {name: server for name, server in arms.servers.items() if name not in arms.failed}

    def _show(self, cell: CellKey, requests: int, done: int) -> None:
        self.progress.request(cell, done, requests)

    def _record(
        self, measured: Measured, result: LoadResult, server: Server | None, start: int, others: float | None
    ) -> None:
        record = record_cell(measured, result, self.plan, self.folder, server, start, others)
        self.folder.store.append(record)
        self.progress.cell(record)
