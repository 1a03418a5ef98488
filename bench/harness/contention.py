"""How busy other processes kept this machine's cores while a row was measured.

On a CPU server every core that something else takes slows the row down, so two arms may differ only because the machine
was busier during one of them. This cannot be undone afterwards, but it can be seen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

# Rows with more than this many cores taken by others are not comparable on a CPU server.
CROWDED_CORES = 0.2


def busy_seconds(proc_stat: str, cores: Iterable[int], ticks_per_second: int) -> float | None:
    """CPU seconds that these cores were not idle since boot, from the text of /proc/stat; None if a core is missing."""
    by_core = {}
    for line in proc_stat.splitlines():
        name, *values = line.split() or [""]
        if name.startswith("cpu") and name[3:].isdigit():
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, values[:8])  # guest time is in user
            by_core[int(name[3:])] = user + nice + system + irq + softirq + steal
    try:
        return sum(by_core[core] for core in cores) / ticks_per_second
    except KeyError:
        return None


def own_seconds() -> float:
    """CPU seconds of this process and all its descendants, ended ones that were waited for included."""
    total = sum(os.times()[:4])
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            used = process.cpu_times()
            total += used.user + used.system + used.children_user + used.children_system
    return total


class ContentionMeter:
    """From its construction to the call of ``other_cores``."""

    def __init__(self) -> None:
        self._start = self._now()

    def other_cores(self) -> float | None:
        """Mean number of cores that processes other than ours and our descendants used; None where it is unknown."""
        start, end = self._start, self._now()
        if start[1] is None or end[1] is None or end[0] <= start[0]:
            return None
        return max(0.0, (end[1] - start[1]) - (end[2] - start[2])) / (end[0] - start[0])

    @staticmethod
    def _now() -> tuple[float, float | None, float]:
        try:
            text = Path("/proc/stat").read_text(encoding="ascii")
        except OSError:
            text = ""
        busy = busy_seconds(text, os.sched_getaffinity(0), os.sysconf("SC_CLK_TCK"))
        return time.monotonic(), busy, own_seconds()
