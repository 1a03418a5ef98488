"""Parts of a sitting: its requests, its time, warming a server up, measuring one cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from zlib import crc32

from bench.figures.steady import Targets, steady_metrics, steady_window
from bench.harness.arms import Arm
from bench.harness.load import LoadClient, LoadResult, load_arguments, warm_up
from bench.harness.profile import LoadConfig
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.schedule import CellKey, block_seed
from bench.harness.server import Server
from bench.harness.sharegpt import Turn
from bench.harness.workload import (
    Tokenizer,
    Workload,
    load_tokenizer,
    output_lengths,
    select_prompts,
    vocabulary_of,
    write_random_ids,
    write_texts,
)

WARM_UP = 0  # stands for a concurrency in the key of the warm-up's requests
SHORT_OUTPUT = 16
# A load's name and the concurrency; below 0 the short wave that compiles what that concurrency needs.
WorkKey = tuple[str, int]


@dataclass
class Preparation:
    """The requests of every block: the same for all arms."""

    plan: RunPlan
    turns: list[Turn]
    model: str
    folder: Path

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.model)

    @cached_property
    def _vocabulary(self) -> int:
        return vocabulary_of(self.model)

    def workloads(self, block: int) -> dict[WorkKey, Workload]:
        """Requests of each level, of the warm-up, and (on GPUs) of one short wave of each number that runs at once."""
        main = self.plan.profile.load
        found = {("", WARM_UP): self._write(block, ("", WARM_UP), main, main.warmup_requests, warm_up_level(self.plan))}
        for level in self.plan.levels():
            load, key = self.plan.profile.load_named(level.load), (level.load, level.concurrency)
            running = self.plan.profile.server.running(level.concurrency)
            short = (level.load, -running)
            if self.plan.profile.server.engine == "cuda" and short not in found:
                short_output = min(SHORT_OUTPUT, load.output_tokens)
                wave = replace(load, output_tokens=short_output, output_spread=0, stagger=False, token_streams=0)
                found[short] = self._write(block, short, wave, running, running)
            found[key] = self._write(block, key, load, load.requests_at(level.concurrency), level.concurrency)
        return found

    def _write(self, block: int, key: WorkKey, load: LoadConfig, count: int, concurrency: int) -> Workload:
        seed = block_seed(self.plan.profile.seed, block) * 10_000 + abs(key[1]) + crc32(key[0].encode())
        lengths = output_lengths(load, count, concurrency, seed)
        path = self.folder / "-".join(filter(None, (f"b{block}", key[0], f"c{key[1]}.json")))
        if load.prompts == "random-ids":
            return write_random_ids(path, load, self._vocabulary, lengths, seed)
        prompts = select_prompts(self.turns, self._tokenizer, load, count, seed=seed)
        return write_texts(path, prompts, lengths, load.token_streams)


def warm_up_level(plan: RunPlan) -> int:
    """Requests of the warm-up in flight."""
    return max(1, min(max(plan.concurrency), plan.profile.load.warmup_requests))


@dataclass
class Budget:
    """The time that may be used; ``seconds`` None: any."""

    seconds: float | None
    _began: float = field(default_factory=lambda: time.monotonic())
    _took: dict[WorkKey, float] = field(default_factory=dict)

    def in_time(self) -> bool:
        return self.seconds is None or time.monotonic() - self._began < self.seconds

    def has_room_for(self, cell: CellKey) -> bool:
        """Whether a row of this level will be over in time if it takes as long as the longest so far."""
        if self.seconds is None:
            return True
        took = self._took.get((cell.load, cell.concurrency), 0.0)
        return time.monotonic() - self._began + took < self.seconds

    @contextmanager
    def measuring(self, cell: CellKey) -> Iterator[None]:
        began, level = time.monotonic(), (cell.load, cell.concurrency)
        try:
            yield
        finally:
            self._took[level] = max(self._took.get(level, 0.0), time.monotonic() - began)


def warm_up_server(
    server: Server,
    arm: Arm,
    works: dict[WorkKey, Workload],
    plan: RunPlan,
    model: str,
    client: LoadClient,
    budget: Budget,
    folder: RunFolder,
) -> int:
    """One short wave of each number that runs at once, since kernels are compiled for the sizes that occur, then rounds
    of the warm-up's requests until ITL is flat; returns their number. Raises OSError if the server ends or does not
    answer."""
    load, rounds_of = plan.profile.load, works["", WARM_UP]
    for name, level in sorted((name, -level) for name, level in works if level < 0):
        if budget.in_time():
            work = works[name, -level]
            wave = load_arguments(plan.profile.load_named(name), work, model, server.port, level, seed=0)
            result = client.run(wave, work, folder.path / "warm-up", server, load.cell_timeout_s)
            if result.requests is None:  # out of memory, say: each further wave would wait for its time limit too
                raise OSError(f"no answers to a warm-up wave of {level} requests: {result.error}")
    concurrency = warm_up_level(plan)
    arguments = load_arguments(load, rounds_of, model, server.port, concurrency, seed=0)

    def measure() -> float | None:
        result = client.run(arguments, rounds_of, folder.path / "warm-up", server, load.cell_timeout_s)
        if not server.alive:
            raise OSError(result.error or "server ended while warming up")
        if result.requests is None:
            return None
        window = steady_window(result.requests, concurrency, bool(load.request_rate))
        return None if window is None else steady_metrics(result.requests, window, Targets()).get("p50_itl_ms")

    def rebalanced() -> bool:
        if not arm.expects_rebalances or plan.profile.server.plan_trace:
            return True
        life = server.summary()
        return bool(life.moved if arm.recorded else life.upstream_ends)

    return warm_up(measure, load.warmup_rounds, rebalanced, budget.in_time)


def measure_cell(
    cell: CellKey,
    work: Workload,
    server: Server,
    client: LoadClient,
    plan: RunPlan,
    model: str,
    folder: RunFolder,
    progress: Callable[[int], None],
) -> LoadResult:
    load = plan.profile.load_named(cell.load)
    seed = block_seed(plan.profile.seed, cell.block)
    arguments = load_arguments(load, work, model, server.port, cell.concurrency, seed)
    return client.run(arguments, work, folder.path / "cells" / cell.name, server, load.cell_timeout_s, progress)
