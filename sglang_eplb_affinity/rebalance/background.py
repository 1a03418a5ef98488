"""One thread for work that waits (pipes, sockets, copy engines), so that the forward passes never do."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Task(Generic[T]):
    """The outcome of one job."""

    def __init__(self, job: Callable[[], T]) -> None:
        self._job: Callable[[], T] | None = job
        self._value: T | None = None
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._started: float | None = None

    def done(self) -> bool:
        return self._done.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        return self._done.wait(seconds)

    @property
    def running_since(self) -> float | None:
        """time.monotonic() at which the thread took the job up; None before that and once it is done."""
        return None if self.done() else self._started

    @property
    def error(self) -> BaseException | None:
        """What the job raised; None while it runs or if it ended well."""
        return self._error

    def result(self) -> T:
        """The job's value, or what it raised; only once it is done."""
        assert self._done.is_set()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def run(self) -> None:
        job, self._job = self._job, None
        assert job is not None
        self._started = time.monotonic()
        try:
            self._value = job()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()


class BackgroundThread:
    """Runs jobs one after another. A daemon: a job that hangs cannot keep the server from ending."""

    def __init__(self, name: str, prepare: Callable[[], object] | None = None) -> None:
        self._queue: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self._prepare = prepare
        self._last: Task[Any] | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> Task[T]:
        task = Task(job)
        self._last = task
        self._queue.put(task)
        return task

    def idle(self) -> bool:
        """Whether everything submitted has ended. Jobs run in order, so the last one tells."""
        return self._last is None or self._last.done()

    def stop(self) -> None:
        """End after the jobs submitted so far."""
        self._queue.put(None)

    def _run(self) -> None:
        if self._prepare is not None:
            self._prepare()
        while (task := self._queue.get()) is not None:
            task.run()
