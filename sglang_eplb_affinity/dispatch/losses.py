"""What is left of a map when GPUs are gone: experts lost, tokens hit, and the rest's traffic and load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.dispatch.evaluate import (
    NO_PASS_LOAD,
    NOT_KEPT,
    check_fits,
    measure_layer,
    passes_of,
    source_gpus,
)
from sglang_eplb_affinity.dispatch.primaries import active_replicas
from sglang_eplb_affinity.dispatch.rules import DispatchRule, RuleNumber
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.domain.topology import Topology


@dataclass(frozen=True)
class Loss:
    """Per layer [layers]: ``experts_lost`` int64; ``tokens_hit``: share of tokens that chose a lost expert.

    ``rest_gpu_fanout`` and ``rest_node_fanout`` float64: per token, of its experts that are left;
    ``rest_load_max_over_mean`` float64: over the GPUs that live.
    """

    experts_lost: np.ndarray
    tokens_hit: np.ndarray
    rest_gpu_fanout: np.ndarray
    rest_node_fanout: np.ndarray
    rest_load_max_over_mean: np.ndarray


def without_gpus(
    trace: RoutingTrace, expert_map: ExpertMap, topology: Topology, rule: DispatchRule, gone: Sequence[int],
    map_source: str = "map", pass_tokens: int | None = None, further_slots: int = 0,
) -> Loss:  # fmt: skip
    """``trace`` dispatched by ``rule`` when the GPUs ``gone`` are lost, whose tokens the others get in turn.

    A token goes on without its lost experts. ``pass_tokens`` of each GPU make one pass, which ``cover_balanced`` sees;
    None: all tokens are one. ``further_slots``: of each GPU, under ``primary``. Raises InputError for GPUs that are not
    there, or all of them.
    """
    check_fits(expert_map, trace.num_layers, trace.num_experts, trace.source, map_source)
    if not gone or min(gone) < 0 or max(gone) >= topology.num_gpus:
        raise InputError(f"GPUs {list(gone)} to be lost: must be some of 0 to {topology.num_gpus - 1}")
    living = np.setdiff1d(np.arange(topology.num_gpus), gone)
    if not len(living):
        raise InputError(f"GPUs {sorted(gone)} to be lost: none would be left")
    slots_per_gpu = topology.slots_per_gpu(expert_map.num_slots)
    source = source_gpus(trace, topology)
    source = np.where(np.isin(source, living), source, living[np.arange(len(source)) % len(living)]).astype(np.int32)
    pass_of, _ = passes_of(len(source), source, topology, pass_tokens)
    alive = np.isin(np.arange(expert_map.num_slots) // slots_per_gpu, living)
    number = RuleNumber.of("static" if rule == "primary" else rule)
    lost, hit, figures = [], [], []
    for layer, row in enumerate(expert_map.physical_to_logical):
        table, replicas = _living_replicas(row, expert_map.num_experts, alive)
        is_lost = replicas == 0
        # A lost expert keeps a slot in the table, which no token asks for: the rules want one.
        table[is_lost, 0], replicas[is_lost] = np.flatnonzero(alive)[0], 1
        if rule == "primary":
            table = active_replicas(table[None], topology, expert_map.num_slots, further_slots)[0]
            replicas = (table >= 0).sum(1).astype(np.int32)
        tokens = trace.topk_ids[:, layer].astype(np.int16)
        masked = np.where(is_lost[tokens], np.int16(-1), tokens)
        masked = np.take_along_axis(masked, np.argsort(masked < 0, axis=1, kind="stable"), axis=1)
        sums, load = np.zeros(5, np.int64), np.zeros(expert_map.num_slots, np.int64)
        measure_layer(
            np.ascontiguousarray(masked), source, table, replicas, slots_per_gpu, topology.gpus_per_node,
            topology.num_nodes, int(number), sums, load, NOT_KEPT, pass_of, NO_PASS_LOAD,
        )  # fmt: skip
        by_gpu = load.reshape(topology.num_gpus, -1).sum(1)[living]
        lost.append(int(is_lost.sum()))
        hit.append(float((masked[:, -1] < 0).mean()))
        figures.append((*(sums[:2] / len(masked)), by_gpu.max() / max(by_gpu.mean(), 1e-12)))
    gpu, node, load_ratio = np.array(figures, np.float64).T
    return Loss(np.array(lost, np.int64), np.array(hit), gpu, node, load_ratio)


def _living_replicas(row: np.ndarray, num_experts: int, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [experts, max_replicas] slots padded with -1, int32 [experts]) of the slots ``alive`` bool [slots]."""
    replicas = np.bincount(row[alive], minlength=num_experts).astype(np.int32)
    table = np.full((num_experts, max(int(replicas.max()), 1)), -1, np.int32)
    filled = np.zeros(num_experts, np.int64)
    for slot in np.flatnonzero(alive):
        table[row[slot], filled[row[slot]]] = slot
        filled[row[slot]] += 1
    return table, replicas
