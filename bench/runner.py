"""Measures the cells of a run that are not there yet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bench.arms import ARMS
from bench.contention import ContentionMeter
from bench.engine import CACHE, Engine, prepare_engine
from bench.environment import now, provenance
from bench.load import LoadResult, load_command, run_load, warm_up
from bench.metrics import latency_metrics, placement_metrics
from bench.probe import DUMP_FOLDER_VARIABLE, Placement, ProbeFailed, probe_placement
from bench.rebalance_log import LogSummary
from bench.run_folder import RunFolder, RunPlan
from bench.schedule import CellKey, Session, block_seed, plan_sessions
from bench.server import Server, ServerFailed, server_command
from bench.sharegpt import Turn
from bench.store import CellRecord
from bench.validity import void_reasons
from bench.workload import Tokenizer, Workload, load_tokenizer, read_prompts, select_prompts, write_workload


class Progress:
    """What a run tells while it goes on; this one tells nothing."""

    def say(self, line: str) -> None: ...

    def request(self, cell: CellKey, done: int, total: int) -> None: ...

    def cell(self, record: CellRecord) -> None: ...


@dataclass
class Runner:
    folder: RunFolder
    plan: RunPlan
    turns: list[Turn]
    progress: Progress

    def run(self) -> None:
        """Measure every session that has cells left; a cell is in the store as soon as it is measured."""
        profile = self.plan.profile
        sessions = plan_sessions(self.plan.arms, self.plan.concurrency, self.plan.blocks)
        left = [s for s in map(self._remaining, sessions) if s.concurrency]
        if not left:
            return
        self.progress.say("preparing the model and the prompts")
        engine = prepare_engine(profile.server)
        engine.environment[DUMP_FOLDER_VARIABLE] = str(self._dumps)
        tokenizer = load_tokenizer(engine.model)
        for session in left:
            self._session(session, engine, self._workloads(session.block, tokenizer))

    @property
    def _dumps(self) -> Path:
        return CACHE / "dumps" / self.folder.name

    def _remaining(self, session: Session) -> Session:
        done = self.folder.store.complete()
        return replace(session, concurrency=tuple(c.concurrency for c in session.cells if c not in done))

    def _workloads(self, block: int, tokenizer: Tokenizer) -> dict[int, Workload]:
        """Prompts of each concurrency, and of the warm-up (key 0); the same for all arms of a block."""
        load = self.plan.profile.load
        seed = block_seed(self.plan.profile.seed, block)
        folder = CACHE / "prompts" / self.folder.name
        found = {}
        for concurrency in (0, *self.plan.concurrency):
            count = load.requests_at(concurrency) if concurrency else load.warmup_requests
            prompts = select_prompts(self.turns, tokenizer, load, count, seed=seed * 10_000 + concurrency)
            found[concurrency] = write_workload(folder / f"b{block}-c{concurrency}.jsonl", prompts)
        return found

    def _session(self, session: Session, engine: Engine, work: dict[int, Workload]) -> None:
        """One server start. A server that fails voids the cells that it could not serve; the run goes on."""
        arm, config = ARMS[session.arm], self.plan.profile.server
        command = server_command(config, arm, engine.model)
        log = self.folder.path / "server" / f"{session.name}.log"
        left = list(session.cells)
        self.progress.say(f"{session.name}: starting the server ({arm.title})")
        try:
            with Server(command, engine, log, config.port, config.ready_timeout_s) as server:
                self._warm_up(session, server, work[0])
                probed = None if arm.uses_eplb else self._probe(server, work[0])
                while left:
                    if not server.alive:
                        raise ServerFailed("server ended before this cell")
                    self._cell(left[0], server, engine, work[left[0].concurrency], command, probed)
                    left.pop(0)
        except (ServerFailed, OSError) as error:
            for cell in left:
                nothing = LoadResult({}, {}, str(error))
                self._record(cell, nothing, work[cell.concurrency], LogSummary((), 0), LogSummary((), 0), command)

    def _warm_up(self, session: Session, server: Server, work: Workload) -> None:
        self.progress.say(f"{session.name}: warming up")
        load = self.plan.profile.load
        concurrency = max(1, min(max(self.plan.concurrency), load.warmup_requests))
        warm_up(server, read_prompts(work.path), load, concurrency, ARMS[session.arm].expects_rebalances)

    def _probe(self, server: Server, work: Workload) -> Placement | None:
        """What the placement of a server without EPLB is worth; None where it cannot be measured."""
        try:
            config = self.plan.profile.server
            return probe_placement(server, read_prompts(work.path), self.plan.profile.load, config, self._dumps)
        except ProbeFailed as error:
            self.progress.say(f"placement not measured: {error}")
            return None

    def _cell(
        self,
        cell: CellKey,
        server: Server,
        engine: Engine,
        work: Workload,
        command: list[str],
        probed: Placement | None,
    ) -> None:
        load = self.plan.profile.load
        seed = block_seed(self.plan.profile.seed, cell.block)
        client = load_command(load, work, engine.model, server.port, cell.concurrency, seed)
        start, meter = server.log_size(), ContentionMeter()
        result = run_load(
            client,
            engine,
            self.folder.path / "cells" / cell.name,
            server,
            load.cell_timeout_s,
            lambda done: self.progress.request(cell, done, work.requests),
        )
        others = meter.other_cores()
        self._record(cell, result, work, server.summary(), server.summary(start), command, probed, others)

    def _record(
        self,
        cell: CellKey,
        result: LoadResult,
        work: Workload,
        life: LogSummary,
        during: LogSummary,
        command: list[str],
        probed: Placement | None = None,
        other_cores: float | None = None,
    ) -> None:
        load = self.plan.profile.load
        metrics = latency_metrics(result.bench, result.requests)
        if other_cores is not None:
            metrics["other_cores"] = other_cores
        void = void_reasons(
            ARMS[cell.arm],
            requested=work.requests,
            output_tokens=load.output_tokens,
            concurrency=cell.concurrency,
            open_loop=bool(load.request_rate),
            metrics=metrics,
            server_life=life,
            cell=during,
            error=result.error,
        )
        flags = command[command.index("--model-path") + 2 :]
        record = CellRecord(
            key=cell,
            finished=now(),
            requests=work.requests,
            seed=block_seed(self.plan.profile.seed, cell.block),
            workload_sha256=work.sha256,
            metrics=metrics,
            placement=placement_metrics(life, during, probed),
            rebalances=during.rebalances,
            void=void,
            provenance={**provenance(), "server_flags": flags},
        )
        self.folder.store.append(record)
        self.progress.cell(record)
