"""How the ranks agree on a round's progress without ever waiting for one another in a forward pass.

All ranks run the same forward passes, so a pass number means the same everywhere. At the end of a pass each rank hands
in its progress, and some passes later all read the smallest: the all-reduce of one number over gloo ran meanwhile on a
thread of the process group. Whatever a rank decides from an agreed number, every rank decides at the same pass.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

FAILED_PHASES = ("recording", "planning", "movement", "time limit", "weights changed")


class Agreement(Protocol):
    """``exchange`` is called once at the end of every pass of a round."""

    def take(self) -> int | None:
        """The smallest of the values that were handed in some passes ago, the same on all ranks; None: not yet."""

    def hand_in(self, value: int) -> None:
        """This rank's value; nothing may be under way."""

    @property
    def under_way(self) -> bool: ...


class GlooAgreement:
    """Over a gloo process group of its own. ``lag``: passes between handing in and taking."""

    def __init__(self, group: dist.ProcessGroup | None, lag: int = 2) -> None:
        found = group if group is not None else dist.group.WORLD
        assert found is not None
        self._group, self._lag = found, lag
        self._tensor = torch.zeros(1, dtype=torch.int64)
        self._word = self._tensor.numpy()
        self._options = dist.AllreduceOptions()
        self._options.reduceOp = dist.ReduceOp.MIN  # type: ignore[assignment]
        self._work: Any = None
        self._age = 0

    @property
    def under_way(self) -> bool:
        return self._work is not None

    def take(self) -> int | None:
        if self._work is None:
            return None
        self._age += 1
        if self._age < self._lag:
            return None
        # Every rank handed its word in passes ago; an error here means that a rank is gone, and then going on could
        # leave ranks with different maps. It is raised.
        self._work.wait()
        self._work = None
        return int(self._word[0])

    def hand_in(self, value: int) -> None:
        assert self._work is None
        self._word[0] = value
        self._age = 0
        # Not dist.all_reduce: its checks take longer than the call, in the thread that launches forward passes.
        self._work = self._group.allreduce([self._tensor], self._options)


def failure_word(rank: int, phase: str) -> int:
    """A negative word: the smallest of all, so one rank's failure is everybody's."""
    return -(1 + rank * len(FAILED_PHASES) + FAILED_PHASES.index(phase))


def failure_text(word: int) -> str:
    rank, phase = divmod(-word - 1, len(FAILED_PHASES))
    return f"{FAILED_PHASES[phase]} failed on rank {rank}; its log says why"
