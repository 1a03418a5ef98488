"""The ``records`` of SGLang's detailed recorder modes (per_pass, per_token), folded from slots to logical experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.content import array_of
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import MAX_EXPERTS, MAX_PAIRS, RoutingWindow, check_distinct, coactivation_of

MOST_ASSIGNMENTS = 1 << 48
"""Largest count that a file may hold; sums of such counts stay exact."""


def window_of_records(source: str, data: dict[str, Any]) -> RoutingWindow:
    """The window of a dump's ``records`` under its ``last_physical_to_logical_map``; ``source`` begins errors."""
    to_logical = array_of(data.get("last_physical_to_logical_map"), source, "last_physical_to_logical_map")
    if to_logical.ndim != 2 or not to_logical.size or to_logical.dtype.kind not in "iu":
        raise InputError(
            f"{source}: last_physical_to_logical_map is {to_logical.dtype} of shape {to_logical.shape}, "
            "but must be integers of shape [layers, slots]"
        )
    if to_logical.min() < 0 or to_logical.max() >= MAX_EXPERTS:
        raise InputError(
            f"{source}: last_physical_to_logical_map has ids {to_logical.min()} to {to_logical.max()}, "
            f"but ids must be 0 to {MAX_EXPERTS - 1}"
        )
    if to_logical.max() >= to_logical.shape[1]:
        raise InputError(
            f"{source}: last_physical_to_logical_map names expert {to_logical.max()}, but {to_logical.shape[1]} slots "
            "cannot hold so many experts"
        )
    to_logical = to_logical.astype(np.int64)
    records = data["records"]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{source}: records is not a list of dicts")
    of_tokens = [record["topk_ids_of_layer"] for record in records if "topk_ids_of_layer" in record]
    if of_tokens:
        return _of_tokens(source, to_logical, of_tokens)
    of_passes = [record["global_physical_count"] for record in records if "global_physical_count" in record]
    if of_passes:
        return RoutingWindow(_of_passes(source, to_logical, of_passes))
    raise InputError(f"{source}: no record holds topk_ids_of_layer (per_token) or global_physical_count (per_pass)")


def _of_passes(source: str, to_logical: np.ndarray, passes: list[Any]) -> np.ndarray:
    """int64 [layers, experts] of per_pass records."""
    physical = np.zeros(to_logical.shape, np.int64)
    for number, value in enumerate(passes):
        name = f"records[{number}] global_physical_count"
        count = array_of(value, source, name)
        if count.shape != physical.shape or count.dtype.kind not in "iu":
            raise InputError(f"{source}: {name} is {count.dtype} of shape {count.shape}, the map {physical.shape}")
        if count.min() < 0 or count.max() > MOST_ASSIGNMENTS:
            raise InputError(f"{source}: {name} holds {count.min()} to {count.max()}, but counts must be 0 or more")
        physical += count.astype(np.int64)
    counts = np.zeros((len(physical), int(to_logical.max()) + 1), np.int64)
    np.add.at(counts, (np.arange(len(physical))[:, None], to_logical), physical)
    return counts


def _of_tokens(source: str, to_logical: np.ndarray, parts: list[Any]) -> RoutingWindow:
    layers, slots = to_logical.shape
    arrays = [array_of(part, source, f"records[{i}] topk_ids_of_layer") for i, part in enumerate(parts)]
    for number, ids in enumerate(arrays):
        if ids.ndim != 3 or ids.shape[::2] != (layers, arrays[0].shape[2]) or ids.dtype.kind not in "iu":
            raise InputError(
                f"{source}: records[{number}] topk_ids_of_layer is {ids.dtype} of shape {ids.shape}, "
                f"but must be integers of shape [{layers} layers, tokens, k]"
            )
    physical = np.concatenate(arrays, axis=1).astype(np.int64)
    if physical.size and (physical.max() >= slots or physical.min() < -1):
        raise InputError(
            f"{source}: records have ids {physical.min()} to {physical.max()}, but the map has {slots} slots"
        )
    logical = np.take_along_axis(to_logical, np.maximum(physical, 0).reshape(layers, -1), 1).reshape(physical.shape)
    logical = np.where(physical >= 0, logical, -1)
    used_columns = (logical >= 0).any(axis=(0, 1))
    logical = logical[:, :, used_columns] if used_columns.any() else logical[:, :, :1]
    experts = int(to_logical.max()) + 1
    if layers * experts**2 > MAX_PAIRS:
        raise InputError(f"{source}: has {layers} layers of {experts} experts; their co-activation is too large")
    counts = np.stack([np.bincount(layer[layer >= 0], minlength=experts) for layer in logical]).astype(np.int64)
    tokens = np.ascontiguousarray(logical, dtype=np.int16)
    check_distinct(tokens, f"{source}: topk_ids_of_layer", ("layer", "token"))
    return RoutingWindow(counts, coactivation_of(tokens, experts) if tokens.size else None, tokens)
