"""Parts of a sitting: its requests, its time, warming a server up, measuring one cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

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

WARM_UP = 0  # the key of the warm-up's requests among those of the concurrencies
SHORT_OUTPUT = 16


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

    def workloads(self, block: int) -> dict[int, Workload]:
        """Requests of each concurrency, of the warm-up, and (keys below 0) of one short wave at each concurrency."""
        load = self.plan.profile.load
        found = {}
        for concurrency in self.plan.concurrency if self.plan.profile.server.engine == "cuda" else ():
            wave = replace(load, output_tokens=min(SHORT_OUTPUT, load.output_tokens), stagger=False)
            found[-concurrency] = self._write(block, -concurrency, wave, concurrency, concurrency)
        for concurrency in (WARM_UP, *self.plan.concurrency):
            count = load.requests_at(concurrency) if concurrency else load.warmup_requests
            in_flight = concurrency or warm_up_concurrency(self.plan)
            found[concurrency] = self._write(block, concurrency, load, count, in_flight)
        return found

    def _write(self, block: int, key: int, load: LoadConfig, count: int, concurrency: int) -> Workload:
        seed = block_seed(self.plan.profile.seed, block) * 10_000 + abs(key)
        lengths = output_lengths(load, count, concurrency, seed)
        path = self.folder / f"b{block}-c{key}.json"
        if load.prompts == "random-ids":
            return write_random_ids(path, load, self._vocabulary, lengths, seed)
        prompts = select_prompts(self.turns, self._tokenizer, load, count, seed=seed)
        return write_texts(path, prompts, lengths)


def warm_up_concurrency(plan: RunPlan) -> int:
    return max(1, min(max(plan.concurrency), plan.profile.load.warmup_requests))


@dataclass
class Budget:
    """The time that may be used; ``seconds`` None: any."""

    seconds: float | None
    _began: float = field(default_factory=lambda: time.monotonic())
    _took: dict[int, float] = field(default_factory=dict)

    def in_time(self) -> bool:
        return self.seconds is None or time.monotonic() - self._began < self.seconds

    def has_room_for(self, concurrency: int) -> bool:
        """Whether a row of this concurrency will be over in time if it takes as long as the longest so far."""
        if self.seconds is None:
            return True
        return time.monotonic() - self._began + self._took.get(concurrency, 0.0) < self.seconds

    @contextmanager
    def measuring(self, concurrency: int) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._took[concurrency] = max(self._took.get(concurrency, 0.0), time.monotonic() - began)


def warm_up_server(
    server: Server,
    arm: Arm,
    works: dict[int, Workload],
    plan: RunPlan,
    model: str,
    client: LoadClient,
    budget: Budget,
    folder: RunFolder,
) -> int:
    """One short wave at each concurrency, since kernels are compiled for the sizes that occur, then rounds of the
    warm-up's requests until ITL is flat; returns their number. Raises OSError if the server ends."""
    load = plan.profile.load
    for level in sorted(-key for key in works if key < 0):
        if budget.in_time():
            wave = load_arguments(load, works[-level], model, server.port, level, seed=0)
            client.run(wave, works[-level], folder.path / "warm-up", server, load.cell_timeout_s)
    concurrency = warm_up_concurrency(plan)
    arguments = load_arguments(load, works[WARM_UP], model, server.port, concurrency, seed=0)

    def measure() -> float | None:
        result = client.run(arguments, works[WARM_UP], folder.path / "warm-up", server, load.cell_timeout_s)
        if not server.alive:
            raise OSError(result.error or "server ended while warming up")
        if result.requests is None:
            return None
        window = steady_window(result.requests, concurrency, bool(load.request_rate))
        return None if window is None else steady_metrics(result.requests, window, Targets()).get("p50_itl_ms")

    def rebalanced() -> bool:
        life = server.summary()
        return not arm.expects_rebalances or bool(life.moved if arm.recorded else life.upstream_ends)

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
    load = plan.profile.load
    seed = block_seed(plan.profile.seed, cell.block)
    arguments = load_arguments(load, work, model, server.port, cell.concurrency, seed)
    return client.run(arguments, work, folder.path / "cells" / cell.name, server, load.cell_timeout_s, progress)
