"""Moving expert weights into staging: the interface, and the choice of path for each pair of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from sglang_eplb_affinity.rebalance.layer_moves import LayerJob
from sglang_eplb_affinity.rebalance.weights import StagingBuffer


class ExpertTransfer(Protocol):
    """Fills ``staging`` row i with the weights of arrival i of ``job``.

    ``run`` is called in a background thread while forward passes go on, with jobs in the same order on every rank, and
    returns when the weights have arrived. It never writes live weights. What it raises gives the round up; a rank that
    fails must still serve its departures, or the ranks that wait for them would hang.
    """

    def run(self, job: LayerJob, staging: StagingBuffer) -> None: ...


class StartedTransfer(ExpertTransfer, Protocol):
    """A path whose copies run by themselves (copy engines): ``begin`` enqueues, ``finish`` waits."""

    def begin(self, job: LayerJob, staging: StagingBuffer) -> None: ...

    def finish(self) -> None: ...


class ByHostTransfer:
    """Peer memory for ranks in ``near`` (this host's, this rank among them), host-staged messages for the others."""

    def __init__(self, near: frozenset[int], peer: StartedTransfer, far: ExpertTransfer) -> None:
        self._near, self._peer, self._far = near, peer, far

    def run(self, job: LayerJob, staging: StagingBuffer) -> None:
        failure: Exception | None = None
        try:
            self._peer.begin(job, staging)
        except Exception as error:  # the far ranks still wait for their departures
            failure = error
        departures = tuple(d for d in job.departures if d.target_rank not in self._near)
        self._far.run(replace(job, departures=departures), staging)
        if failure is not None:
            raise failure
        self._peer.finish()
