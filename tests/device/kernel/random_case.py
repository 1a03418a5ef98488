"""Random placements, ids and row layouts; the kernel and the torch reference must do the same with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sglang_eplb_affinity.device.launch_shape import LaunchShapes
from sglang_eplb_affinity.device.map_and_record import LayerTables, MapAndRecord, Placement
from sglang_eplb_affinity.device.recorder import AffinityRecorder, RecorderConfig, RowLayout
from sglang_eplb_affinity.dispatch.rules import DispatchRule, choose_replicas
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology


@dataclass(frozen=True)
class Case:
    rule: DispatchRule | None
    gpus: int = 4
    nodes: int = 2
    experts: int = 24
    redundant: int = 8
    hot: int = 3  # so many experts share the redundant slots
    most_replicas: int | None = None  # of an expert; None: any number
    k: int = 4
    groups: tuple[tuple[int, int], ...] = ((20, 3),)  # (tokens, padding) of each data-parallel rank
    even: bool = True
    source: int | None = 1
    valid: bool = False
    dtype: torch.dtype = torch.int32
    extra_columns: int = 0
    layers: int = 2
    record: bool = True
    shapes: LaunchShapes | None = None
    zero_experts: int = 0  # ids behind the experts' that a router may choose
    first_token: int = 0  # of the pass, that the first row is
    seed: int = 0


def random_map(random: np.random.Generator, case: Case) -> ExpertMap:
    """Any expert may have several replicas, also on one GPU."""
    slots = case.experts + case.redundant
    rows = []
    for _ in range(case.layers):
        hot = min(case.hot, case.experts)
        if case.most_replicas is None:
            extra = random.integers(0, hot, case.redundant)
        else:
            extra = random.permutation(np.repeat(np.arange(hot), case.most_replicas - 1))[: case.redundant]
        rows.append(random.permutation(np.concatenate([np.arange(case.experts), extra])))
    return ExpertMap(np.stack(rows).reshape(case.layers, slots), case.experts)


def tables_of(case: Case, expert_map: ExpertMap, device: str) -> list[LayerTables | None]:
    """As SGLang keeps them: int64, rows padded with -1 to the number of slots."""
    if case.rule is None:
        return [None] * case.layers
    all_physical = expert_map.logical_to_all_physical().astype(np.int64)
    topology = Topology(case.gpus, case.nodes)
    if case.rule == "static":
        experts = torch.arange(case.experts)[:, None]
        source, slots = case.source or 0, expert_map.num_slots
        chosen = [
            choose_replicas(experts, torch.from_numpy(table), topology, slots, "static", source)
            for table in all_physical
        ]
        return [LayerTables("static", of_layer.flatten().to(device)) for of_layer in chosen]
    wide = np.full((case.layers, case.experts, expert_map.num_slots), -1, np.int64)
    wide[:, :, : all_physical.shape[2]] = all_physical
    counts = torch.from_numpy(expert_map.replica_counts().astype(np.int64)).to(device)
    slots = torch.from_numpy(wide).to(device)
    return [LayerTables(case.rule, slots[layer], counts[layer]) for layer in range(case.layers)]


def random_ids(random: np.random.Generator, rows: int, case: Case) -> torch.Tensor:
    ids = np.argsort(random.random((rows, case.experts + case.zero_experts)), axis=1)[:, : case.k]
    ids[random.random(rows) < 0.1] = -1  # already masked
    shared = np.full((rows, case.extra_columns), case.experts)
    return torch.from_numpy(np.hstack([ids, shared])).to(case.dtype)


def path(case: Case, device: str, expert_map: ExpertMap) -> MapAndRecord:
    recorder = None
    if case.record:
        recorder = AffinityRecorder(
            num_layers=case.layers,
            num_experts=case.experts,
            top_k=case.k,
            num_groups=len(case.groups),
            device=device,
            config=RecorderConfig(sample_tokens=30, max_pass_tokens=50, seed=case.seed),
        )
    replicas = int(expert_map.replica_counts().max())
    placement = Placement(Topology(case.gpus, case.nodes), expert_map.num_slots, replicas, case.source)
    return MapAndRecord(case.k, recorder, placement, case.shapes)


def run(case: Case, device: str, passes: int = 3) -> None:
    """Some passes through the kernel and through the reference; everything they leave must be equal."""
    random = np.random.default_rng(case.seed)
    expert_map = random_map(random, case)
    tables = tables_of(case, expert_map, device)
    ours, reference = path(case, device, expert_map), path(case, device, expert_map)
    lengths = [tokens + padding for tokens, padding in case.groups]
    rows = RowLayout(tuple([max(lengths)] * len(lengths) if case.even else lengths), case.first_token)
    for number in range(passes):
        for side in (ours, reference):
            if side.recorder is not None:
                side.recorder.begin_pass(
                    [tokens + case.first_token for tokens, _ in case.groups], phase=number % 2, record=number != 1
                )
        for layer in range(case.layers):
            ids = random_ids(random, rows.num_rows, case).to(device)
            valid = torch.tensor(int(random.integers(0, rows.num_rows + 1)), device=device) if case.valid else None
            expected, found = ids.clone(), ids.clone()
            reference.reference(layer, expected, rows, tables[layer], valid)
            ours(layer, found, rows, tables[layer], valid)
            assert torch.equal(found, expected), (number, layer)
            if case.rule is not None:
                check_physical(ids, found, expert_map.physical_to_logical[layer], case, valid)
        for side in (ours, reference):
            if side.recorder is not None:
                side.recorder.end_pass()
    if ours.recorder is not None and reference.recorder is not None:
        assert torch.equal(ours.recorder.counts, reference.recorder.counts)
        assert ours.recorder.counts.any()
        assert torch.equal(ours.recorder.sample(), reference.recorder.sample())


def check_physical(
    logical: torch.Tensor, physical: torch.Tensor, slots: np.ndarray, case: Case, valid: torch.Tensor | None
) -> None:
    """Every id is a slot that holds its expert; padding is -1; other columns are left alone."""
    assert torch.equal(logical[:, case.k :], physical[:, case.k :])
    before, after = logical[:, : case.k].cpu().numpy(), physical[:, : case.k].cpu().numpy()
    kept = np.arange(len(before)) < (len(before) if valid is None else int(valid))
    assert (after[~kept] == -1).all()
    used = (before >= 0) & (before < case.experts) & kept[:, None]
    others = ~used & kept[:, None]
    assert (after[others] == before[others]).all()
    assert (slots[after[used]] == before[used]).all()
