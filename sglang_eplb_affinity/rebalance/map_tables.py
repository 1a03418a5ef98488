"""SGLang's map tensors, changed one layer at a time and in place, so that captured CUDA graphs see the change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sglang_eplb_affinity.rebalance.layer_moves import LayerPlan


@dataclass(frozen=True)
class StagedTables:
    """One layer's new rows on the device: int64 [slots], [experts, width], [experts], and [columns] or None.

    ``replicas`` covers as many columns as the old or the new table uses; beyond them both hold -1.
    """

    plan: LayerPlan
    slots: torch.Tensor
    replicas: torch.Tensor
    num_replicas: torch.Tensor
    static_choice: torch.Tensor | None


class MapTables:
    """``physical_to_logical`` [layers, slots], ``logical_to_all_physical`` [layers, experts, slots],
    ``num_replicas`` [layers, experts] and ``static_choice`` [layers, columns] (rank_table of layer_moves; None unless
    dispatch is ``static`` or ``primary``): the tensors that dispatch reads. ``host_*``: SGLang's copies on the CPU."""

    def __init__(
        self,
        physical_to_logical: torch.Tensor,
        logical_to_all_physical: torch.Tensor,
        num_replicas: torch.Tensor,
        static_choice: torch.Tensor | None,
        host_physical_to_logical: torch.Tensor,
        host_logical_to_all_physical: torch.Tensor,
        rank: int,
    ) -> None:
        self._slots, self._replicas, self._num_replicas = physical_to_logical, logical_to_all_physical, num_replicas
        self._static_choice, self._rank = static_choice, rank
        self._host_slots, self._host_replicas = host_physical_to_logical, host_logical_to_all_physical

    def stage(self, plan: LayerPlan) -> StagedTables:
        """Bring one layer's rows to the device; on the current stream, in a background thread."""
        layer, width = plan.layer, plan.replicas.shape[1]
        used = int((self._host_replicas[layer] >= 0).sum(1).max())
        replicas = np.full((len(plan.replicas), max(width, used)), -1, np.int64)
        replicas[:, :width] = plan.replicas
        static = None
        if self._static_choice is not None:
            assert plan.static_choice is not None
            static = self._like(self._static_choice, plan.static_choice[self._rank])
        return StagedTables(
            plan,
            self._like(self._slots, plan.slots),
            self._like(self._replicas, replicas),
            self._like(self._num_replicas, (plan.replicas >= 0).sum(1)),
            static,
        )

    def commit(self, staged: StagedTables) -> None:
        """Put one layer's rows in force: copies on the current stream, and the CPU's rows at once."""
        layer, width = staged.plan.layer, staged.replicas.shape[1]
        self._slots[layer].copy_(staged.slots, non_blocking=True)
        self._replicas[layer, :, :width].copy_(staged.replicas, non_blocking=True)
        self._num_replicas[layer].copy_(staged.num_replicas, non_blocking=True)
        if staged.static_choice is not None and self._static_choice is not None:
            self._static_choice[layer].copy_(staged.static_choice, non_blocking=True)
        plan = staged.plan
        self._host_slots[layer].copy_(torch.from_numpy(plan.slots))
        host = self._host_replicas[layer]
        host[:, :width] = -1
        host[:, : plan.replicas.shape[1]] = torch.from_numpy(plan.replicas).to(host.dtype)

    @staticmethod
    def _like(target: torch.Tensor, values: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(np.ascontiguousarray(values)).to(target.dtype)
        return host.to(target.device)
