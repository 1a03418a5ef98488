"""A thread that looks at a rebalancer from outside, so that a phase that hangs is named in the log."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

logger = logging.getLogger(__name__)


class Watched(Protocol):
    def check_time(self) -> None: ...


class Watchdog:
    """Calls ``check_time`` every ``seconds`` until stopped."""

    def __init__(self, watched: Watched, seconds: float) -> None:
        self._watched, self._seconds = watched, seconds
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="eplb-watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                self._watched.check_time()
            except Exception:
                logger.exception("[eplb-affinity] watchdog")
