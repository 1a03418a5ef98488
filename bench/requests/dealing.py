"""Requests in flight, dealt to ranks as they arrive: how even queues stay, and which tokens then form a step."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

WARM_UP_TURNS = 2


class Dealer(Protocol):
    """Picks the rank of an arriving request."""

    def pick(self, request: int, running: np.ndarray) -> int:
        """``running`` int64 [ranks]: requests on each rank."""


class RoundRobin:
    def __init__(self) -> None:
        self._next = 0

    def pick(self, request: int, running: np.ndarray) -> int:
        rank = self._next % len(running)
        self._next += 1
        return rank


class ShortestQueue:
    """The rank with fewest requests; equals take turns."""

    def __init__(self) -> None:
        self._turn = 0

    def pick(self, request: int, running: np.ndarray) -> int:
        ranks = np.roll(np.arange(len(running)), -self._turn)
        self._turn = (self._turn + 1) % len(running)
        return int(ranks[running[ranks].argmin()])


@dataclass(frozen=True)
class Nearest:
    """Among ranks with at most ``band`` requests more than the least loaded one, the nearest in experts.

    ``score`` float32 [requests, ranks].
    """

    score: np.ndarray
    band: int

    def pick(self, request: int, running: np.ndarray) -> int:
        near = np.where(running <= running.min() + self.band, self.score[request], -np.inf)
        ranks = np.flatnonzero(near == near.max())
        return int(ranks[running[ranks].argmin()])


class SamePrompt:
    """The rank that served the same prompt last, if within ``band`` of the least loaded one; else the least loaded."""

    def __init__(self, band: int) -> None:
        self._band, self._last, self._else = band, dict[int, int](), ShortestQueue()

    def pick(self, request: int, running: np.ndarray) -> int:
        rank = self._last.get(request)
        if rank is None or running[rank] > running.min() + self._band:
            rank = self._else.pick(request, running)
        self._last[request] = rank
        return rank


@dataclass(frozen=True)
class InFlight:
    """The requests of one step: int64 [running] their number, the tokens that they have generated, and their rank."""

    request: np.ndarray
    age: np.ndarray
    rank: np.ndarray


@dataclass(frozen=True)
class Dealt:
    """``steps``: some steps of the run. ``queue_max_over_mean``: mean over steps. ``repeats_hit``: of the arrivals,
    the share whose prompt the rank still had in its cache (see :func:`deal`)."""

    steps: tuple[InFlight, ...]
    queue_max_over_mean: float
    repeats_hit: float


def deal(dealer: Dealer, lengths: np.ndarray, ranks: int, running_per_rank: int, steps: int, seed: int = 0) -> Dealt:
    """A closed loop: whenever a request ends, another drawn at random arrives. ``lengths`` int64 [requests], in tokens.

    As many prompts as there are requests in the trace are sent again and again, and each rank's prefix cache holds 1.5
    times its share of them (the least recently used one goes).
    """
    rng = np.random.default_rng(seed)
    total = ranks * running_per_rank
    running = np.zeros(ranks, np.int64)
    request, age, rank = (np.zeros(total, np.int64) for _ in range(3))
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(ranks)]
    room = -(-3 * len(lengths) // (2 * ranks))
    hits = arrivals = 0

    def arrive(place: int) -> None:
        nonlocal hits, arrivals
        request[place] = rng.integers(len(lengths))
        prompt = int(request[place])
        chosen = dealer.pick(prompt, running)
        rank[place] = chosen
        running[chosen] += 1
        cache = caches[chosen]
        arrivals += 1
        hits += int(prompt in cache)
        cache[prompt] = None
        cache.move_to_end(prompt)
        if len(cache) > room:
            cache.popitem(last=False)

    for place in range(total):
        arrive(place)
        age[place] = rng.integers(lengths[request[place]])
    turn = math.ceil(float(lengths.mean()))
    taken: list[InFlight] = []
    queue = []
    hits = arrivals = 0
    every = max(1, turn // steps)
    for now in range((WARM_UP_TURNS + 1) * turn + 1):
        ended = np.flatnonzero(age >= lengths[request])
        np.subtract.at(running, rank[ended], 1)
        for ending in ended:
            arrive(int(ending))
            age[ending] = 0
        if now >= WARM_UP_TURNS * turn:
            queue.append(running.max() / running.mean())
            if len(taken) < steps and (now - WARM_UP_TURNS * turn) % every == 0:
                taken.append(InFlight(request.copy(), age.copy(), rank.copy()))
        age += 1
    return Dealt(tuple(taken), float(np.mean(queue)), hits / max(arrivals, 1))
