"""Cores of their own for what must not wait for a core: each scheduler, the rest of a server, and the load generator.

Unpinned, a tokenizer or the load generator lands on a scheduler's core now and then, and a pass that the host launches
kernel by kernel takes longer. Servers side by side get the same cores: one runs at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SCHEDULER = "sglang::scheduler"
_FEWEST_CORES = 4  # of a scheduler: its own thread, and those of the communication libraries


@dataclass(frozen=True)
class Cores:
    """Who gets which; neighbouring numbers, which are hyper-threads of one core or share a socket."""

    schedulers: tuple[tuple[int, ...], ...]
    rest: tuple[int, ...]
    client: tuple[int, ...]

    @staticmethod
    def of(available: Sequence[int], ranks: int) -> Cores | None:
        """An eighth for the load generator, two eighths or more for the rest of the server, the others for the
        schedulers. None where there are too few for that."""
        cores, each = sorted(available), min(8, 5 * len(available) // (8 * ranks))
        if each < _FEWEST_CORES:
            return None
        client = max(2, len(cores) // 8)
        taken = each * ranks
        return Cores(
            tuple(tuple(cores[each * rank : each * (rank + 1)]) for rank in range(ranks)),
            tuple(cores[taken : len(cores) - client]),
            tuple(cores[len(cores) - client :]),
        )


def pin_server(leader: int, cores: Cores) -> int:
    """Pin all threads of the server whose first process is ``leader``; returns how many schedulers were found."""
    processes = [psutil.Process(leader), *psutil.Process(leader).children(recursive=True)]
    schedulers = sorted((p for p in processes if _title(p).startswith(SCHEDULER)), key=_title)
    for process in processes:
        if process not in schedulers:
            pin_process(process.pid, cores.rest)
    for process, own in zip(schedulers, cores.schedulers, strict=False):
        pin_process(process.pid, own)
    return len(schedulers)


def pin_process(process: int, cores: Iterable[int]) -> None:
    """All threads that it has now; later ones inherit."""
    for thread in Path(f"/proc/{process}/task").glob("*"):
        with suppress(OSError):  # it has ended
            os.sched_setaffinity(int(thread.name), cores)


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return (process.cmdline() or [""])[0]
    return ""
