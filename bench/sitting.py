"""Parts of a sitting: its requests, its time, warming a server up, measuring one cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bench.arms import Arm
from bench.load import LoadClient, LoadResult, load_arguments, warm_up
from bench.run_folder import RunFolder, RunPlan
from bench.schedule import CellKey, block_seed
from bench.server import Server
from bench.sharegpt import Turn
from bench.steady import Targets, steady_metrics, steady_window
from bench.workload import (
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
        """Requests of each concurrency, and of the warm-up."""
        load = self.plan.profile.load
        found = {}
        for concurrency in (WARM_UP, *self.plan.concurrency):
            count = load.requests_at(concurrency) if concurrency else load.warmup_requests
            seed = block_seed(self.plan.profile.seed, block) * 10_000 + concurrency
            lengths = output_lengths(load, count, concurrency or warm_up_concurrency(self.plan), seed)
            path = self.folder / f"b{block}-c{concurrency}.json"
            if load.prompts == "random-ids":
                found[concurrency] = write_random_ids(path, load, self._vocabulary, lengths, seed)
            else:
                prompts = select_prompts(self.turns, self._tokenizer, load, count, seed=seed)
                found[concurrency] = write_texts(path, prompts, lengths)
        return found


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
    """Rounds of the warm-up's requests until ITL is flat; returns their number. Raises OSError if the server ends."""
    load = plan.profile.load
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

    return warm_up(
        measure, load.warmup_rounds, lambda: not arm.expects_rebalances or bool(server.summary().moved), budget.in_time
    )


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
