"""One step per MoE layer: top-k ids become physical, padding is masked, and the choices are recorded.

On CUDA one Triton launch does it all (map_and_record_kernel.py); elsewhere, and inside torch.compile, the torch
references do. Both work on static buffers without waiting for the device, so a CUDA graph can capture either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sglang_eplb_affinity.device.cover_words import GpuCodes
from sglang_eplb_affinity.device.launch_shape import LaunchShape, LaunchShapes, default_shapes
from sglang_eplb_affinity.device.recorder import AffinityRecorder, RowLayout
from sglang_eplb_affinity.dispatch.rules import COVER_RULES, DispatchRule, RuleNumber, choose_replicas
from sglang_eplb_affinity.domain.topology import Topology

try:
    import triton

    from sglang_eplb_affinity.device.triton import balance_kernel as balance
    from sglang_eplb_affinity.device.triton import map_and_record_kernel as kernel
except ImportError:  # CPU environments have no Triton
    triton = kernel = balance = None  # type: ignore[assignment]

# Triton whose compiled kernels are launched directly; others go through its slower general launcher.
_DIRECT_LAUNCH = ("3.6.",)


@dataclass(frozen=True)
class LayerTables:
    """One layer's replicas, in tensors that are updated in place at a rebalance (SGLang keeps them so).

    ``static``: ``slots`` int64 [experts] is the slot of each expert for this rank, ``counts`` is None. Else ``slots``
    int64 [experts, >= max replicas], each row's first ``counts`` (int64 [experts]) entries in rising order.
    """

    rule: DispatchRule
    slots: torch.Tensor
    counts: torch.Tensor | None = None


@dataclass(frozen=True)
class Placement:
    """What the rules need to know: ``source_gpu`` None where all ranks run all tokens and must choose alike."""

    topology: Topology
    num_slots: int
    max_replicas: int
    source_gpu: int | None = None


class MapAndRecord:
    """Callable for each layer of each pass; ``recorder`` None: map only, ``placement`` None: record only.

    ``shapes``: how the kernel is launched, None for the defaults of each rule.
    """

    def __init__(
        self,
        top_k: int,
        recorder: AffinityRecorder | None,
        placement: Placement | None,
        shapes: LaunchShapes | None = None,
    ) -> None:
        self.top_k, self.recorder, self.placement, self.shapes = top_k, recorder, placement, shapes
        self._kernels: dict[Any, Any] = {}
        self._balance: torch.Tensor | None = None
        self._pointers: dict[
            tuple[int, DispatchRule | None], tuple[LayerTables | None, tuple[Any, ...], tuple[Any, ...]]
        ] = {}

    def __call__(
        self,
        layer: int,
        topk_ids: torch.Tensor,
        rows: RowLayout,
        tables: LayerTables | None = None,
        num_valid_rows: torch.Tensor | None = None,
    ) -> None:
        """``topk_ids`` int32 or int64 [rows, >= top_k], logical ids, is overwritten with physical ids if ``tables``.

        Rows from ``num_valid_rows`` (a device scalar) on are padding: not recorded, and -1 afterwards. Columns from
        ``top_k`` on are left alone.
        """
        if not topk_ids.shape[0]:
            return
        if self._uses_kernel(topk_ids):
            self._launch(layer, topk_ids, rows, tables, num_valid_rows)
        else:
            self.reference(layer, topk_ids, rows, tables, num_valid_rows)

    def reference(
        self,
        layer: int,
        topk_ids: torch.Tensor,
        rows: RowLayout,
        tables: LayerTables | None = None,
        num_valid_rows: torch.Tensor | None = None,
    ) -> None:
        """The same in plain torch."""
        if self.recorder is not None:
            self.recorder.record(layer, topk_ids, rows, num_valid_rows)
        if tables is None:
            return
        ids = topk_ids[:, : self.top_k]
        logical = ids
        if num_valid_rows is not None:
            valid = torch.arange(len(ids), device=ids.device) < num_valid_rows
            logical = torch.where(valid[:, None], ids, -1)
        physical = map_ids(logical, tables, self.placement)
        ids.copy_(physical)

    @staticmethod
    def _uses_kernel(topk_ids: torch.Tensor) -> bool:
        if kernel is None or topk_ids.stride(1) != 1 or torch.compiler.is_compiling():
            return False
        return topk_ids.is_cuda or triton.knobs.runtime.interpret is True  # a stand-in for Triton has anything

    def _launch(
        self,
        layer: int,
        topk_ids: torch.Tensor,
        rows: RowLayout,
        tables: LayerTables | None,
        num_valid_rows: torch.Tensor | None,
    ) -> None:
        num_rows = topk_ids.shape[0]
        even = rows.is_even
        rule = None if tables is None else tables.rule
        known = self._pointers.get((layer, rule))
        if known is None or known[0] is not tables:
            known = self._pointers[layer, rule] = (tables, *self._fixed(layer, tables))
        if not even and self.recorder is not None:
            self.recorder.say_uneven_rows(rows)
        shapes = self.shapes or default_shapes(rule)
        if rule != "cover_balanced":
            self._launch_stage(0, shapes.of(num_rows, self.top_k), known, topk_ids, rows, tables, num_valid_rows)
            return
        for stage in (balance.BOTH,) if num_rows <= shapes.one_program_rows else (balance.COUNT, balance.CHOOSE):
            shape = shapes.of(num_rows, self.top_k)
            self._launch_stage(stage, shape, known, topk_ids, rows, tables, num_valid_rows)

    def _launch_stage(
        self,
        stage: int,
        shape: LaunchShape,
        known: tuple[LayerTables | None, tuple[Any, ...], tuple[Any, ...]],
        topk_ids: torch.Tensor,
        rows: RowLayout,
        tables: LayerTables | None,
        num_valid_rows: torch.Tensor | None,
    ) -> None:
        """``stage``: of balance_kernel.py, 0 for every other rule."""
        num_rows = topk_ids.shape[0]
        rule = None if tables is None else tables.rule
        even = rows.is_even
        key = topk_ids.dtype, None if num_valid_rows is None else num_valid_rows.dtype, rule, even, shape.block, stage
        numbers = (num_rows, topk_ids.stride(0), rows.row_number)
        cached = self._kernels.get(key)
        if cached is not None:
            compiled, constants, width, block, device = cached
            compiled.run(
                -(-num_rows * width // block), 1, 1, torch._C._cuda_getCurrentRawStream(device), compiled.function,
                compiled.packed_metadata, None, None, None,
                topk_ids.data_ptr(), None if num_valid_rows is None else num_valid_rows.data_ptr(),
                *known[2], *numbers, *constants,
            )  # fmt: skip
            return
        shape.check(rule)
        constants = self._constants(tables, num_valid_rows is not None, even, shape, stage)
        # Rows are cut into programs, or their items.
        covers = rule in COVER_RULES
        width = self.top_k if not covers else triton.next_power_of_2(self.top_k) if shape.lanes else 1
        grid = (triton.cdiv(num_rows * width, shape.block),)
        tensors = (topk_ids, topk_ids if num_valid_rows is None else num_valid_rows, *known[1])
        options = {"num_warps": shape.num_warps}
        if covers:  # without being told that there are enough, the compiler spills a few registers
            options["maxnreg"] = shape.max_registers
        compiled = kernel.map_and_record[grid](*tensors, *numbers, *constants, **options)
        if compiled is not None and triton.__version__.startswith(_DIRECT_LAUNCH):
            self._kernels[key] = (compiled, constants, width, shape.block, topk_ids.device.index)

    def _fixed(self, layer: int, tables: LayerTables | None) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """(state, counts, sample, table, table counts, workspace) of a layer, as tensors and as addresses."""
        recorder = self.recorder
        table = tables.slots if tables is not None else None
        counts = tables.counts if tables is not None else None
        if recorder is None:
            assert table is not None
            tensors = (table, table, table, table, table if counts is None else counts)
        else:
            state = recorder.state
            tensors = (
                state, recorder.counts[0, layer], recorder.sample_rows[layer], state if table is None else table,
                state if counts is None else counts,
            )  # fmt: skip
        balanced = tables is not None and tables.rule == "cover_balanced"
        with_workspace = (*tensors, self._workspace(tensors[3]) if balanced else tensors[3])
        return with_workspace, tuple(tensor.data_ptr() for tensor in with_workspace)

    def _workspace(self, table: torch.Tensor) -> torch.Tensor:
        """All layers share it, one after the other; empty between them."""
        if self._balance is None:
            assert self.placement is not None
            bins = triton.next_power_of_2(self.placement.topology.num_gpus)
            size = balance.TICKET_INTS + 2 * bins
            self._balance = torch.zeros(size, dtype=torch.int32, device=table.device)
        return self._balance

    def _constants(
        self, tables: LayerTables | None, has_valid: bool, even: bool, shape: LaunchShape, stage: int
    ) -> tuple[Any, ...]:
        """The kernel's constexpr arguments in order."""
        recorder, placement = self.recorder, self.placement
        rule = kernel.NO_RULE if tables is None else int(RuleNumber.of(tables.rule))
        gpu_bins = 1
        record = (False, has_valid, 1, even, 0, 0, 0, 0)
        if recorder is not None and stage != balance.CHOOSE:
            config = recorder.config
            record = (
                True, has_valid, recorder.num_groups, even, recorder.slot_offset, config.max_pass_tokens,
                config.sample_tokens, recorder.num_layers * recorder.num_experts,
            )  # fmt: skip
        place = (0, 1, 1, 1, -1, 8, 1)
        if tables is not None and placement is not None:
            topology = placement.topology
            codes = GpuCodes.of(topology)
            gpu_bins = triton.next_power_of_2(topology.num_gpus)
            place = (
                tables.slots.stride(0), topology.slots_per_gpu(placement.num_slots), topology.gpus_per_node,
                topology.num_nodes, -1 if placement.source_gpu is None else placement.source_gpu,
                codes.field_bits, codes.node_step,
            )  # fmt: skip
        bins = triton.next_power_of_2(recorder.num_experts) if shape.count_in_program and recorder is not None else 0
        padded = triton.next_power_of_2(self.top_k)
        experts = len(tables.slots) if tables is not None else recorder.num_experts if recorder is not None else 0
        return (self.top_k, padded, shape.block, rule, *record, *place, bins, shape.lanes, stage, gpu_bins, experts)


def map_ids(topk_ids: torch.Tensor, tables: LayerTables, placement: Placement | None) -> torch.Tensor:
    """Physical ids of logical ``topk_ids`` [rows, k]; what is no expert's id stays as it is."""
    if tables.rule == "static":
        used = (topk_ids >= 0) & (topk_ids < len(tables.slots))
        return torch.where(used, tables.slots[torch.where(used, topk_ids, 0).long()].to(topk_ids.dtype), topk_ids)
    assert placement is not None
    slots = tables.slots[:, : placement.max_replicas]
    return choose_replicas(topk_ids, slots, placement.topology, placement.num_slots, tables.rule, placement.source_gpu)
