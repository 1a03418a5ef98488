"""``--alert NAME=VALUE``: limits on what a server says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.monitor.reading import FIGURES, Placement, Reading


@dataclass(frozen=True)
class Watched:
    """``below``: a value under the limit alerts, else one above it. ``values``: by what they are of."""

    below: bool
    values: Callable[[Reading], dict[str, float | None]]


def _of_placements(value: Callable[[Placement], float | None]) -> Callable[[Reading], dict[str, float | None]]:
    return lambda reading: {
        "" if placement.dp_rank is None else f" dp_rank {placement.dp_rank}": value(placement)
        for placement in reading.placements
    }


def _figure(name: str) -> Callable[[Reading], dict[str, float | None]]:
    return _of_placements(lambda placement: placement.in_force(name))


WATCHED: dict[str, Watched] = {
    **{name: Watched(name == "balancedness", _figure(name)) for name in FIGURES},
    "delivered_load": Watched(
        False, _of_placements(lambda placement: placement.judged.get("delivered", {}).get("load"))
    ),
    "regret": Watched(False, _of_placements(lambda placement: placement.regret)),
    "failed_rounds": Watched(False, _of_placements(lambda placement: placement.rounds.get("failed", 0))),
    "ttft_p99": Watched(False, lambda reading: {"": reading.ttft_p99}),
    "tpot_mean": Watched(False, lambda reading: {"": reading.tpot_mean}),
}


@dataclass(frozen=True)
class Alert:
    url: str
    of: str
    name: str
    value: float
    limit: float

    def __str__(self) -> str:
        side = "below" if WATCHED[self.name].below else "above"
        return f"{self.url}{self.of}: {self.name} {self.value:.4g} is {side} {self.limit:g}"

    def to_json(self) -> dict[str, Any]:
        return {"url": self.url, "of": self.of.strip(), "name": self.name, "value": self.value, "limit": self.limit}


@dataclass(frozen=True)
class Limit:
    name: str
    value: float

    @staticmethod
    def parse(text: str) -> Limit:
        name, _, number = text.partition("=")
        if name not in WATCHED:
            raise InputError(f"--alert {text}: {name!r} is not one of {', '.join(WATCHED)}")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"--alert {text}: {number!r} is not a number, as in --alert {name}=0.8")
        return Limit(name, value)

    def check(self, reading: Reading) -> tuple[list[Alert], list[str]]:
        """Alerts, and what has no value yet."""
        watched, alerts, missing = WATCHED[self.name], [], []
        for of, value in watched.values(reading).items():
            if value is None:
                missing.append(f"{reading.url}{of}: {self.name} has no value yet")
            elif value < self.value if watched.below else value > self.value:
                alerts.append(Alert(reading.url, of, self.name, value, self.value))
        return alerts, missing


def check_all(limits: Iterable[Limit], readings: Iterable[Reading]) -> tuple[list[Alert], list[str]]:
    alerts, missing = [], []
    pairs = [(limit, reading) for reading in readings for limit in limits]
    for limit, reading in pairs:
        found, without = limit.check(reading)
        alerts += found
        missing += without
    return alerts, missing
