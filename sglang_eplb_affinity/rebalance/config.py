"""Settings of asynchronous rebalancing (--eplb-async)."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_eplb_affinity.domain.errors import InputError


@dataclass(frozen=True)
class AsyncConfig:
    """Passes are forward passes of the server; every rank runs the same ones, so they are the common clock.

    ``interval``: passes from one round's start to the next. ``warm_up``: passes after the server's start before the
    first interval begins. ``run_once``: no more rounds after the first that was applied. ``layers_in_flight``: layers
    whose weights travel at the same time; each has a staging buffer. ``phase_limit_seconds``: how long one phase of a
    round may take before the round is given up (planning, or the movement of one layer).
    """

    interval: int
    warm_up: int = 0
    run_once: bool = False
    layers_in_flight: int = 2
    phase_limit_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise InputError(f"--eplb-rebalance-num-iterations {self.interval}: must be at least 1")
        if self.warm_up < 0:
            raise InputError(f"--eplb-async-warm-up-passes {self.warm_up}: must be 0 or more")
        if self.layers_in_flight < 1:
            raise InputError(f"--eplb-async-layers-in-flight {self.layers_in_flight}: must be at least 1")
        if not self.phase_limit_seconds > 0:
            raise InputError(f"--eplb-async-phase-limit {self.phase_limit_seconds}: must be above 0 seconds")
