"""The map from physical experts (slots) to logical experts, and the replica tables that follow from it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.content import array_of, read_content
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.reading import name_of


@dataclass(frozen=True)
class ExpertMap:
    """Which logical expert each slot of each layer holds.

    ``physical_to_logical`` is int32 [layers, slots]. Construction checks the invariants: every id is in
    [0, num_experts) and every logical expert has at least one replica in every layer.
    """

    physical_to_logical: np.ndarray
    num_experts: int

    def __post_init__(self) -> None:
        ids = np.asarray(self.physical_to_logical)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(
                f"expert map: physical_to_logical_map is {ids.dtype} of shape {ids.shape}, "
                "but must be integers of shape [layers, slots]"
            )
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_experts):
            layer, slot = np.argwhere((ids < 0) | (ids >= self.num_experts))[0]
            raise InputError(
                f"expert map: layer {layer} slot {slot} holds expert {ids[layer, slot]}, "
                f"but ids must be 0 to {self.num_experts - 1}"
            )
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        object.__setattr__(self, "physical_to_logical", ids)
        if ids.size and self.num_experts > ids.shape[1]:  # before tables are made for a number that one id may claim
            held = set(ids[0].tolist())
            absent = next(expert for expert in range(ids.shape[1] + 1) if expert not in held)
            raise InputError(
                f"expert map: layer 0 has no replica of logical expert {absent}, since {ids.shape[1]} slots cannot "
                f"hold {self.num_experts} experts; every logical expert needs at least one slot"
            )
        missing = np.argwhere(self.replica_counts() == 0)
        if len(missing):
            layer, expert = missing[0]
            raise InputError(
                f"expert map: layer {layer} has no replica of logical expert {expert} "
                f"({len(missing)} missing in all); every logical expert needs at least one slot"
            )

    @property
    def num_layers(self) -> int:
        return int(self.physical_to_logical.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.physical_to_logical.shape[1])

    def replica_counts(self) -> np.ndarray:
        """int32 [layers, experts]: replicas of each logical expert."""
        layers = self.physical_to_logical.shape[0]
        flat = self.physical_to_logical + np.arange(layers, dtype=np.int64)[:, None] * self.num_experts
        counts = np.bincount(flat.ravel(), minlength=layers * self.num_experts)
        return counts.reshape(layers, self.num_experts).astype(np.int32)

    def logical_to_all_physical(self) -> np.ndarray:
        """int32 [layers, experts, max_replicas]: slots of each expert in rising order, padded with -1."""
        layers, slots = self.physical_to_logical.shape
        order = np.argsort(self.physical_to_logical, axis=1, kind="stable")
        experts = np.take_along_axis(self.physical_to_logical, order, axis=1)
        counts = self.replica_counts()
        first = np.cumsum(counts, axis=1) - counts
        replica = np.arange(slots)[None, :] - np.take_along_axis(first, experts, axis=1)
        table = np.full((layers, self.num_experts, int(counts.max(initial=1))), -1, dtype=np.int32)
        table[np.arange(layers)[:, None], experts, replica] = order
        return table

    @staticmethod
    def contiguous(num_layers: int, num_experts: int, num_slots: int) -> ExpertMap:
        """SGLang's ``trivial`` start: slot p holds expert p modulo num_experts."""
        row = np.arange(num_slots, dtype=np.int32) % num_experts
        return ExpertMap(np.tile(row, (num_layers, 1)), num_experts)

    def aligned(self, num_layers: int, dense_layers: int, source: str, of: str) -> ExpertMap:
        """With ``num_layers`` rows, as routing ``of`` has: leading dense layers dropped or added where they differ.

        Added rows hold SGLang's start placement. Raises InputError, beginning with ``source``, if they do not fit.
        """
        own = self.num_layers
        if own == num_layers:
            return self
        if own == num_layers + dense_layers:
            return ExpertMap(self.physical_to_logical[dense_layers:], self.num_experts)
        if own + dense_layers == num_layers:
            dense = ExpertMap.contiguous(dense_layers, self.num_experts, self.num_slots).physical_to_logical
            return ExpertMap(np.concatenate([dense, self.physical_to_logical]), self.num_experts)
        given = f" with {dense_layers} dense" if dense_layers else ""
        raise InputError(
            f"{source}: has {own} layers, but {of} has {num_layers}{given}; if one of them leaves out leading dense "
            f"layers, give their number (--dense-layers {abs(own - num_layers)})"
        )

    def contiguous_like(self) -> ExpertMap:
        """SGLang's start of as many layers, experts and slots."""
        return ExpertMap.contiguous(self.num_layers, self.num_experts, self.num_slots)

    # ---- SGLang's file format: {"physical_to_logical_map": [[...]]} ----

    def to_json(self) -> dict[str, Any]:
        return {"physical_to_logical_map": self.physical_to_logical.tolist()}

    @staticmethod
    def from_json(data: Any, num_experts: int | None = None, *, source: str = "expert map") -> ExpertMap:
        """From SGLang's format. Without ``num_experts`` it is the largest id + 1."""
        if not isinstance(data, dict) or "physical_to_logical_map" not in data:
            raise InputError(f'{source}: not an expert map; expected {{"physical_to_logical_map": [layers][slots]}}')
        ids = map_rows(data["physical_to_logical_map"], source, "physical_to_logical_map")
        try:
            return ExpertMap(ids, int(ids.max()) + 1 if num_experts is None else num_experts)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write SGLang's JSON atomically (temporary file, then rename)."""
        write_atomically(Path(path), json.dumps(self.to_json()).encode())

    @staticmethod
    def load(path: str | os.PathLike[str], num_experts: int | None = None) -> ExpertMap:
        return ExpertMap.from_json(read_content(path), num_experts, source=name_of(path))


def map_rows(rows: Any, source: str, name: str) -> np.ndarray:
    """Integers [layers, slots] of a tensor or of lists; InputError names the first layer of another length."""
    if isinstance(rows, list):
        for layer, row in enumerate(rows):
            if not isinstance(row, list):
                raise InputError(f"{source}: {name} layer {layer} is {type(row).__name__}, but must list expert ids")
            if len(row) != len(rows[0]):
                raise InputError(
                    f"{source}: {name} layer {layer} has {len(row)} slots, but layer 0 has {len(rows[0])}; "
                    "every layer must have the same number"
                )
    ids = array_of(rows, source, name)
    if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
        raise InputError(
            f"{source}: {name} is {ids.dtype} of shape {ids.shape}, but must be integers of shape [layers, slots]"
        )
    return ids
