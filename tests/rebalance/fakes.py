"""Several ranks in one process, without a network: what the state machine does is then decided by the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.rebalance.commit import LayerCommitter, StagedLayer
from sglang_eplb_affinity.rebalance.config import AsyncConfig
from sglang_eplb_affinity.rebalance.layer_moves import LayerJob, layer_plan
from sglang_eplb_affinity.rebalance.map_tables import MapTables
from sglang_eplb_affinity.rebalance.plan_round import PlanReply
from sglang_eplb_affinity.rebalance.rebalancer import AsyncRebalancer, Parts, Phase
from sglang_eplb_affinity.rebalance.round_record import RoundRecord
from sglang_eplb_affinity.rebalance.weights import LayerWeights, StagingBuffer, staging_row_bytes

LAYERS, EXPERTS, SLOTS, RANKS = 4, 8, 12, 3
LOCAL = SLOTS // RANKS
TOPOLOGY = Topology(RANKS)
CPU = torch.device("cpu")


class Board:
    """The smallest of what all ranks handed in, ``lag`` passes later."""

    def __init__(self) -> None:
        self.words: dict[int, list[int]] = {}  # by number of the exchange


class BoardAgreement:
    def __init__(self, board: Board, lag: int = 2) -> None:
        self._board, self._lag, self._age, self._number = board, lag, -1, 0

    @property
    def under_way(self) -> bool:
        return self._age >= 0

    def hand_in(self, value: int) -> None:
        assert not self.under_way
        self._number += 1
        self._board.words.setdefault(self._number, []).append(value)
        self._age = 0

    def take(self) -> int | None:
        if self._age < 0:
            return None
        self._age += 1
        if self._age < self._lag:
            return None
        words = self._board.words[self._number]
        assert len(words) == RANKS, "a rank did not hand in its word at the same pass"
        self._age = -1
        return min(words)


class Share:
    def wait(self) -> tuple[int, np.ndarray, torch.Tensor]:
        raise NotImplementedError


@dataclass
class Window:
    """Counts what the rebalancer asks for."""

    starts: list[int] = field(default_factory=list)
    takes: int = 0
    passes: int = 0
    failure: Exception | None = None

    def start(self) -> None:
        self.starts.append(self.passes)

    def take(self) -> Share:
        self.takes += 1
        if self.failure is not None:
            raise self.failure
        return Share()


def fingerprint(layer: int, expert: int, tensor: int) -> int:
    return (layer * 37 + expert * 5 + tensor) % 251


def weights_of(slots: np.ndarray, rank: int) -> dict[int, list[torch.Tensor]]:
    """For each layer a float32 [local slots, 3, 2] and a uint8 [local slots, 5], told apart by their fingerprints."""
    out = {}
    for layer, row in enumerate(slots):
        of_rank = row.reshape(-1, LOCAL)[rank]
        wide = torch.stack([torch.full((3, 2), float(fingerprint(layer, e, 0))) for e in of_rank])
        narrow = torch.stack([torch.full((5,), fingerprint(layer, e, 1), dtype=torch.uint8) for e in of_rank])
        out[layer] = [wide, narrow]
    return out


class Rank:
    """One rank: live weights, maps, and a rebalancer whose transfer reads the other ranks' live weights."""

    def __init__(self, cluster: Cluster, rank: int, config: AsyncConfig) -> None:
        start = ExpertMap.contiguous(LAYERS, EXPERTS, SLOTS)
        self.rank, self.cluster = rank, cluster
        self.tensors = weights_of(start.physical_to_logical, rank)
        self.live = {
            layer: LayerWeights.of(layer, lambda t=tensors: t, LOCAL) for layer, tensors in self.tensors.items()
        }
        self.slots = torch.from_numpy(start.physical_to_logical.astype(np.int64))
        table = start.logical_to_all_physical().astype(np.int64)
        self.table = torch.full((LAYERS, EXPERTS, SLOTS), -1)
        self.table[:, :, : table.shape[2]] = torch.from_numpy(table)
        self.valid = (self.table >= 0).sum(2)
        tables = MapTables(self.slots, self.table, self.valid, None, self.slots.clone(), self.table.clone(), rank)
        self.window = Window()
        self.records: list[RoundRecord] = []
        self.commits: list[tuple[int, int]] = []  # (pass, layer)
        rows = staging_row_bytes(self.live)
        self.staging = tuple(StagingBuffer(LOCAL, rows, "cpu") for _ in range(config.layers_in_flight))
        self.committer = LayerCommitter(self.live, tables, CPU)
        parts = Parts(
            window=self.window,
            plan=lambda share, current, first: cluster.plan(self, current, first),
            transfer=self,
            committer=self,
            staging=self.staging,
            agreement=BoardAgreement(cluster.board),
            bytes_per_expert={layer: of_layer.bytes_per_expert for layer, of_layer in self.live.items()},
            report=(lambda record, in_force: self.records.append(record)) if rank == 0 else None,
        )
        self.rebalancer = AsyncRebalancer(config, parts, start, algorithm="affinity", rank=rank, num_ranks=RANKS)

    # ---- ExpertTransfer ----

    def run(self, job: LayerJob, staging: StagingBuffer) -> None:
        self.cluster.before_transfer(self.rank, job)
        for row, arrival in enumerate(job.arrivals):
            source = self.cluster.ranks[arrival.source_rank].live[job.layer]
            (parts,), (slot,) = staging.parts(source, [row]), source.slots([arrival.source_slot])
            for part, tensor in zip(parts, slot, strict=True):
                part.copy_(tensor)

    # ---- Committer ----

    def prepare(self, plan, job, staging) -> StagedLayer:  # type: ignore[no-untyped-def]
        return self.committer.prepare(plan, job, staging)

    def commit(self, staged: StagedLayer):  # type: ignore[no-untyped-def]
        self.commits.append((self.cluster.passes, staged.plan.layer))
        return self.committer.commit(staged)

    def check(self) -> None:
        """Every slot holds the expert that the map says, and the tables belong to the map."""
        for layer, tensors in self.tensors.items():
            for slot in range(LOCAL):
                expert = int(self.slots[layer, self.rank * LOCAL + slot])
                assert (tensors[0][slot] == fingerprint(layer, expert, 0)).all(), (layer, slot)
                assert (tensors[1][slot] == fingerprint(layer, expert, 1)).all(), (layer, slot)
        found = ExpertMap(self.slots.numpy(), EXPERTS)
        table = found.logical_to_all_physical()
        assert (self.table[:, :, : table.shape[2]].numpy() == table).all()
        assert (self.table[:, :, table.shape[2] :] == -1).all()
        assert (self.valid.numpy() == found.replica_counts()).all()
        assert (self.rebalancer.in_force.physical_to_logical == self.slots.numpy()).all()


class Cluster:
    """``targets``: the map that each round plans, in turn. ``before_transfer`` and ``plan`` can be replaced."""

    def __init__(self, config: AsyncConfig, targets: list[np.ndarray]) -> None:
        self.board, self.targets, self.passes = Board(), targets, 0
        self.before_transfer: Callable[[int, LayerJob], None] = lambda rank, job: None
        self.planning_error: dict[int, Exception] = {}  # by rank, in the first round
        self.replies: list[PlanReply] = []
        self._lock = threading.Lock()
        self.ranks = [Rank(self, rank, config) for rank in range(RANKS)]

    def plan(self, rank: Rank, current: ExpertMap, first: bool) -> PlanReply:
        if rank.rank in self.planning_error and rank.rebalancer.rounds == 1:
            raise self.planning_error[rank.rank]
        number = rank.rebalancer.rounds - 1
        with self._lock:
            if self.replies:
                return self.replies[min(number, len(self.replies) - 1)]
        target = self.targets[number % len(self.targets)]
        old = current.physical_to_logical
        changed = [layer for layer in range(LAYERS) if (old[layer] != target[layer]).any()]
        layers = tuple(layer_plan(n, old[n], target[n], EXPERTS, TOPOLOGY, "dynamic") for n in changed)
        return PlanReply("planned" if layers else "unchanged", layers=layers, tokens=7)

    def step(self, settle: bool = True) -> None:
        """One forward pass on all ranks; with ``settle`` the background threads get time between passes."""
        self.passes += 1
        for rank in self.ranks:
            rank.check()
            rank.window.passes = self.passes
            rank.rebalancer.on_forward_pass_end()
        if settle:
            time.sleep(0.002)

    def run(self, done: Callable[[], bool], limit: int = 2000) -> None:
        for _ in range(limit):
            if done():
                return
            self.step()
        raise AssertionError("not done: " + ", ".join(rank.rebalancer.phase.value for rank in self.ranks))

    @property
    def records(self) -> list[RoundRecord]:
        return self.ranks[0].records

    @property
    def phase(self) -> Phase:
        (phase,) = {rank.rebalancer.phase for rank in self.ranks}
        return phase


def random_map(seed: int) -> np.ndarray:
    """int32 [layers, slots]: every expert once, then redundant ones, shuffled."""
    random = np.random.default_rng(seed)
    rows = [np.concatenate([np.arange(EXPERTS), random.integers(0, EXPERTS, SLOTS - EXPERTS)]) for _ in range(LAYERS)]
    return np.stack([random.permutation(row) for row in rows]).astype(np.int32)
