"""A bar on standard error while something long goes on; nothing where that is not a terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click


@contextmanager
def progress(total: int, label: str, show: bool = True) -> Iterator[Callable[[int], object]]:
    """Gives what is called with the number of steps done since the last call, from any thread."""
    if not show or not sys.stderr.isatty():
        yield lambda steps: None
        return
    lock = threading.Lock()
    with click.progressbar(length=total, label=label, file=sys.stderr, show_pos=True) as bar:

        def update(steps: int) -> None:
            with lock:
                bar.update(steps)

        yield update
