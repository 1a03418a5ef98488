"""Ranks as processes with everything real but the model: gloo, the planner process, the transfers, the commits.

    python -m tests.rebalance.ranks SCENARIO.json      (one process for each rank; see Scenario)

A "forward pass" is an all-reduce of all ranks in which each checks that every slot holds the expert that its map names,
so a commit that is not the same everywhere, or that tears weights and maps apart, ends the process.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig
from sglang_eplb_affinity.rebalance import window_exchange
from sglang_eplb_affinity.rebalance.agreement import GlooAgreement
from sglang_eplb_affinity.rebalance.commit import LayerCommitter
from sglang_eplb_affinity.rebalance.config import AsyncConfig
from sglang_eplb_affinity.rebalance.host_staged import HostStagedTransfer
from sglang_eplb_affinity.rebalance.map_tables import MapTables
from sglang_eplb_affinity.rebalance.paths import Members, make_transfer
from sglang_eplb_affinity.rebalance.peer_copy import PeerCopyTransfer
from sglang_eplb_affinity.rebalance.plan_round import PlanSettings
from sglang_eplb_affinity.rebalance.planner_client import PlannerProcess
from sglang_eplb_affinity.rebalance.rebalancer import AsyncRebalancer, Parts, Phase
from sglang_eplb_affinity.rebalance.round_record import RoundRecord
from sglang_eplb_affinity.rebalance.transfer import ExpertTransfer
from sglang_eplb_affinity.rebalance.watchdog import Watchdog
from sglang_eplb_affinity.rebalance.weights import LayerWeights, StagingBuffer, staging_row_bytes
from sglang_eplb_affinity.rebalance.window_exchange import WindowExchange, WindowShape

LAYERS, EXPERTS, TOP_K, SAMPLE = 3, 16, 2, 64
SLOTS = 18  # on all ranks together


@dataclass(frozen=True)
class Scenario:
    """``faults``: what goes wrong in which round (counted from 1), by name; see :class:`Rank`."""

    folder: str
    ranks: int = 3
    rounds: int = 4
    device: str = "cpu"
    interval: int = 4
    pass_seconds: float = 0.0
    phase_limit_seconds: float = 60.0
    expert_elements: int = 64
    through_host: bool = False  # host-staged messages also between the GPUs of one host
    open_descriptors: int = 0  # held by each rank from the start, as the sockets of a large server are
    faults: dict[str, int] = field(default_factory=dict)


class Recorder:
    """Every rank has seen other tokens in every round; ``fails`` makes the next share unreadable."""

    def __init__(self, rank: int) -> None:
        self._random = np.random.default_rng(rank)
        self.fails = False

    def start(self) -> None: ...

    def take(self) -> Recorder:
        return self

    def wait(self) -> tuple[int, np.ndarray, torch.Tensor]:
        if self.fails:
            self.fails = False
            raise RuntimeError("planted: the window cannot be read")
        seen = int(self._random.integers(20, 100))
        hot = self._random.permutation(EXPERTS)
        ids = hot[np.minimum(self._random.geometric(0.3, (LAYERS, SAMPLE, TOP_K)) - 1, EXPERTS - 1)]
        ids[:, :, 1] = (ids[:, :, 0] + 1 + ids[:, :, 1] % (EXPERTS - 1)) % EXPERTS  # two different experts
        used = min(seen, SAMPLE)
        ids[:, used:] = -1
        counts = np.stack([np.bincount(row[:used].ravel(), minlength=EXPERTS) for row in ids]).astype(np.int64)
        return seen, np.stack([counts, 0 * counts]), torch.from_numpy(ids.astype(np.int16))


class Rank:
    """One process."""

    def __init__(self, scenario: Scenario, rank: int) -> None:
        self.scenario, self.rank = scenario, rank
        self.records: list[RoundRecord] = []
        self.slots_of_ranks, local_slots = SLOTS, SLOTS // scenario.ranks
        self.own_slots = slice(rank * local_slots, (rank + 1) * local_slots)
        device = torch.device("cpu")
        if scenario.device == "cuda":
            device = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        self.device = device
        start = ExpertMap.contiguous(LAYERS, EXPERTS, self.slots_of_ranks)
        own = start.physical_to_logical[:, self.own_slots]
        self.tensors = {layer: self.weights_of(layer, row) for layer, row in enumerate(own)}
        weights = {
            layer: LayerWeights.of(layer, lambda t=tensors: t, local_slots) for layer, tensors in self.tensors.items()
        }
        self.slots = torch.from_numpy(start.physical_to_logical.astype(np.int64)).to(device)
        host_table = torch.full((LAYERS, EXPERTS, self.slots_of_ranks), -1)
        table = start.logical_to_all_physical()
        host_table[:, :, : table.shape[2]] = torch.from_numpy(table.astype(np.int64))
        self.table, self.host_slots = host_table.to(device).clone(), self.slots.cpu().clone()
        self.valid = (self.table >= 0).sum(2)
        tables = MapTables(self.slots, self.table, self.valid, None, self.host_slots, host_table, rank)

        agree, plan, move = (dist.new_group(backend="gloo") for _ in range(3))
        members = Members(agree, rank, (0,))
        row_bytes = staging_row_bytes(weights)
        limit = scenario.phase_limit_seconds
        if scenario.through_host:
            self.transfer: ExpertTransfer = HostStagedTransfer(
                weights, rank, lambda r: r, move, device, rows=local_slots, row_bytes=row_bytes, limit_seconds=limit
            )
        else:
            self.transfer = make_transfer(weights, members, move, device, local_slots, row_bytes, limit)
        self.window = Recorder(rank)
        shape = WindowShape(LAYERS, EXPERTS, TOP_K, SAMPLE)
        topology = Topology(scenario.ranks)
        settings = PlanSettings("affinity", PlannerConfig(dispatch="dynamic"), topology, staging_rows=local_slots)
        self.planner = PlannerProcess(settings, scenario.phase_limit_seconds) if rank == 0 else None
        if self.planner is not None:
            assert self.planner.wait_until_ready(120)
        exchange = WindowExchange(shape, settings, self.planner, plan, rank, scenario.ranks)
        config = AsyncConfig(scenario.interval, phase_limit_seconds=scenario.phase_limit_seconds)
        self.rebalancer = AsyncRebalancer(
            config,
            Parts(
                window=self.window,
                plan=exchange.plan,
                transfer=self.transfer,
                committer=LayerCommitter(weights, tables, device),
                staging=tuple(StagingBuffer(local_slots, row_bytes, device) for _ in range(2)),
                agreement=GlooAgreement(agree),
                bytes_per_expert={layer: of_layer.bytes_per_expert for layer, of_layer in weights.items()},
                report=(lambda record, in_force: self.records.append(record)) if rank == 0 else None,
            ),
            start,
            algorithm="affinity",
            rank=rank,
            num_ranks=scenario.ranks,
            prepare=partial(torch.cuda.set_device, device) if device.type == "cuda" else None,
        )
        Watchdog(self.rebalancer, min(1.0, scenario.phase_limit_seconds / 4))

    # ---- weights told apart by their values ----

    def weights_of(self, layer: int, experts: np.ndarray) -> list[torch.Tensor]:
        """bf16 [slots, elements / 2, 2] and a transposed float32 [slots, 3, 4], as quantisation scales are."""
        wide = torch.stack(
            [self.value(layer, int(e), 0).expand(self.scenario.expert_elements // 2, 2) for e in experts]
        )
        scale = torch.stack([self.value(layer, int(e), 1).expand(4, 3) for e in experts]).transpose(1, 2)
        return [
            wide.to(torch.bfloat16).contiguous().to(self.device),
            scale.to(self.device, torch.float32).transpose(1, 2).contiguous().transpose(1, 2),
        ]

    @staticmethod
    def value(layer: int, expert: int, tensor: int) -> torch.Tensor:
        return torch.tensor(float(layer * 64 + expert * 2 + tensor))

    def forward(self) -> None:
        """On the device, without waiting for it: the kernels of a pass read weights and maps in stream order."""
        if not hasattr(self, "_wrong"):
            self._wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        own = self.slots[:, self.own_slots]
        for layer, tensors in self.tensors.items():
            for number, tensor in enumerate(tensors):
                expected = (layer * 64 + own[layer] * 2 + number).to(tensor.dtype).view(-1, 1, 1)
                # Of large experts some hundred values all over: a copy that is torn is torn in long runs.
                self._wrong += (tensor[:, :: max(1, tensor.shape[1] // 256)] != expected).sum()
        first = self.table.gather(2, (self.valid - 1)[:, :, None])[:, :, 0]  # the last replica of each expert
        self._wrong += (self.slots.gather(1, first) != torch.arange(EXPERTS, device=self.device)).sum()
        self._wrong += (
            (self.slots[:, None, :] == torch.arange(EXPERTS, device=self.device)[None, :, None])
            .sum(2)
            .ne(self.valid)
            .sum()
        )
        everyones = self.slots.cpu() if self.device.type == "cuda" and self.rebalancer.rounds % 5 == 0 else None
        if self.device.type == "cpu" or everyones is not None:
            mine = (self.slots if everyones is None else everyones).double()
            low, high = mine.clone(), mine.clone()
            dist.all_reduce(low, op=dist.ReduceOp.MIN)
            dist.all_reduce(high, op=dist.ReduceOp.MAX)
            assert (low == high).all(), "ranks have different maps"
        else:
            dist.all_reduce(torch.zeros(1))
        if self.scenario.pass_seconds:
            time.sleep(self.scenario.pass_seconds)

    # ---- faults ----

    def plant(self) -> None:
        """Before the pass that begins a round: what the scenario wants to go wrong in it."""
        number = self.rebalancer.rounds + 1
        wanted = {name for name, at in self.scenario.faults.items() if at == number}
        planner = self.planner
        if planner is not None and planner.pid is not None and "planner killed" in wanted:
            os.kill(planner.pid, signal.SIGSTOP)  # so that it is killed in the middle
            threading.Timer(0.2, os.kill, (planner.pid, signal.SIGKILL)).start()
        if planner is not None and planner.pid is not None and "planner too slow" in wanted:
            os.kill(planner.pid, signal.SIGSTOP)
        if "window unreadable" in wanted and self.rank == 1:
            self.window.fails = True
        if "read raises" in wanted and self.rank == 1:
            peer = isinstance(self.transfer, PeerCopyTransfer)
            owner = PeerCopyTransfer if peer else HostStagedTransfer
            self._once(owner, "pull" if peer else "read", RuntimeError("planted"))
        if "no memory for the sum" in wanted and self.rank == 0:
            self._once(window_exchange, "RoutingWindow", MemoryError("planted"))
        if "no memory to receive" in wanted and self.rank == 0:
            self._once(WindowExchange, "_room", MemoryError("planted"))
        if "messages lost" in wanted and self.rank == 1:
            self._once(HostStagedTransfer, "_exchange", RuntimeError("planted"))
        if "slow rank" in wanted and self.rank == 1:
            self._once(HostStagedTransfer, "_send", None)

    @staticmethod
    def _once(owner: object, name: str, error: Exception | None) -> None:
        original = getattr(owner, name)

        def replaced(*args, **kwargs):  # type: ignore[no-untyped-def]
            setattr(owner, name, original)
            if error is not None:
                raise error
            time.sleep(2)
            return original(*args, **kwargs)

        setattr(owner, name, replaced)

    def run(self) -> dict[str, object]:
        passes, memory, slowest, planted, descriptors = 0, [], 0.0, 0, []
        while True:
            ending = torch.tensor([int(self.rank == 0 and len(self.records) >= self.scenario.rounds)])
            dist.broadcast(ending, 0)
            if ending[0]:
                break
            if self.rebalancer.phase is Phase.WAITING and planted == self.rebalancer.rounds:
                planted += 1
                self.plant()
            self.forward()
            began = time.perf_counter()
            self.rebalancer.on_forward_pass_end()
            slowest = max(slowest, time.perf_counter() - began)
            passes += 1
            if self.rebalancer.phase is Phase.WAITING and len(memory) < self.rebalancer.rounds:
                memory.append(_resident_mb())
                descriptors.append(len(os.listdir("/proc/self/fd")))
        self._wrong = self._wrong.cpu()
        return {
            "passes": passes,
            "wrong": int(self._wrong),
            "slowest_pass_end_ms": 1000 * slowest,
            "planner_starts": self.planner.starts if self.planner is not None else None,
            "memory_mb": memory,
            "descriptors": descriptors,
            "transfer": type(self.transfer).__name__,
            "records": [asdict(record) for record in self.records],
        }


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main(path: str) -> None:
    import torch.multiprocessing as multiprocessing

    scenario = Scenario(**json.loads(Path(path).read_text()))
    multiprocessing.spawn(_process, args=(scenario,), nprocs=scenario.ranks)


def _process(rank: int, scenario: Scenario) -> None:
    torch.set_num_threads(1)
    if scenario.open_descriptors:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(scenario.open_descriptors)]
        assert held[-1] > scenario.open_descriptors
    folder = Path(scenario.folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=scenario.ranks)
    found = Rank(scenario, rank)
    result = found.run()
    (folder / f"rank-{rank}.json").write_text(json.dumps(result, default=str))
    if found.planner is not None:
        found.planner.close()
    dist.barrier()
    os._exit(0)  # peers' memory is mapped until the very end


if __name__ == "__main__":
    main(sys.argv[1])
