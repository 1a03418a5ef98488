"""Reading the files that SGLang's expert distribution recorder writes, as the planner's routing window.

Three kinds, told apart by their keys (all are ``torch.save`` of a dict):

- ``stat``: ``logical_count`` [steps, layers, experts] (or [layers, experts]): counts only;
- ours: the same plus ``affinity`` = ``{"version": 1, "counts", "coactivation", "tokens"}``;
- ``per_token``: ``records``, each with ``topk_ids_of_layer`` int32 [layers, tokens, k] of PHYSICAL ids (-1 unused), and
  ``last_physical_to_logical_map`` [layers, slots], with which they are folded to logical ids. SGLang notes that the map
  may have changed during recording, so record per token without rebalances. One file per rank; give all of them.

For DeepSeek models ``layers`` counts the leading dense layers too; they have no traffic.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingWindow, coactivation_of

AFFINITY_VERSION = 1


def read_dumps(paths: Sequence[str | os.PathLike[str]], sample_size: int = 8192, seed: int = 0) -> RoutingWindow:
    """One window from one or several dump files of the same model; raises InputError that names the file.

    Counts and co-activation are added up; token samples are joined and thinned evenly to ``sample_size`` per layer.
    """
    windows = [(str(path), _read_dump(str(path))) for path in paths]
    first_path, total = windows[0]
    for path, window in windows[1:]:
        if window.counts.shape != total.counts.shape:
            raise InputError(
                f"{path}: has [layers, experts] {window.counts.shape}, but {first_path} has {total.counts.shape}"
            )
        total = _add(total, window)
    if total.tokens is None:
        return total
    return RoutingWindow(total.counts, total.coactivation, _thin(total.tokens, sample_size, seed), total.phase_counts)


def _read_dump(path: str) -> RoutingWindow:
    data = _load(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds a {type(data).__name__}, but a recorder dump is a dict")
    if "affinity" in data:
        return _from_affinity(path, data["affinity"])
    if "records" in data:
        return _from_records(path, data)
    if "logical_count" in data:
        counts = _array(path, data, "logical_count")
        if counts.ndim == 3:
            counts = counts.sum(0)
        if counts.ndim != 2:
            raise InputError(f"{path}: logical_count has shape {counts.shape}, but must be [steps, layers, experts]")
        return RoutingWindow(np.ascontiguousarray(counts, dtype=np.int64))
    raise InputError(
        f"{path}: not a recorder dump; expected the key logical_count, affinity or records, "
        f"found {', '.join(sorted(map(str, data))) or 'none'}"
    )


def _load(path: str) -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(f"{path}: reading a recorder dump needs torch, which is not installed") from None
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception:  # torch raises many types on foreign files
        raise InputError(f"{path}: not a file that torch.load(weights_only=True) can read") from None


def _array(path: str, data: dict[str, Any], key: str) -> np.ndarray:
    value: Any = data.get(key)
    if not hasattr(value, "numpy"):
        raise InputError(f"{path}: {key} is missing or not a tensor")
    return np.asarray(value.cpu().numpy())


def _from_affinity(path: str, data: dict[str, Any]) -> RoutingWindow:
    if data.get("version") != AFFINITY_VERSION:
        raise InputError(
            f"{path}: affinity entry of version {data.get('version')}, but this package reads {AFFINITY_VERSION}"
        )
    counts = _array(path, data, "counts")
    pairs = None if data.get("coactivation") is None else _array(path, data, "coactivation")
    tokens = None if data.get("tokens") is None else _array(path, data, "tokens").astype(np.int16)
    of_phase = None if data.get("phase_counts") is None else _array(path, data, "phase_counts").astype(np.int64)
    try:
        return RoutingWindow(counts.astype(np.int64), pairs, tokens, of_phase)
    except (InputError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def _from_records(path: str, data: dict[str, Any]) -> RoutingWindow:
    to_logical = _array(path, data, "last_physical_to_logical_map").astype(np.int64)
    parts = [_array(path, record, "topk_ids_of_layer") for record in data["records"] if "topk_ids_of_layer" in record]
    if not parts:
        raise InputError(f"{path}: no record holds topk_ids_of_layer; record with mode per_token")
    physical = np.concatenate(parts, axis=1).astype(np.int64)
    layers, slots = to_logical.shape
    if physical.shape[0] != layers or physical.max(initial=-1) >= slots:
        raise InputError(
            f"{path}: records have {physical.shape[0]} layers and ids up to {physical.max(initial=-1)}, "
            f"but the map has {layers} layers of {slots} slots"
        )
    logical = np.where(physical >= 0, np.take_along_axis(to_logical, np.maximum(physical, 0).reshape(layers, -1), 1)
                       .reshape(physical.shape), -1)  # fmt: skip
    used_columns = (logical >= 0).any(axis=(0, 1))
    logical = logical[:, :, used_columns] if used_columns.any() else logical[:, :, :1]
    experts = int(to_logical.max()) + 1
    counts = np.stack([np.bincount(layer[layer >= 0], minlength=experts) for layer in logical]).astype(np.int64)
    tokens = np.ascontiguousarray(logical, dtype=np.int16)
    return RoutingWindow(counts, coactivation_of(tokens, experts), tokens)


def _add(a: RoutingWindow, b: RoutingWindow) -> RoutingWindow:
    pairs = None
    if a.coactivation is not None and b.coactivation is not None:
        pairs = a.coactivation + b.coactivation
    tokens = a.tokens if b.tokens is None else b.tokens
    if a.tokens is not None and b.tokens is not None:
        k = max(a.tokens.shape[2], b.tokens.shape[2])
        padded = [np.pad(t, ((0, 0), (0, 0), (0, k - t.shape[2])), constant_values=-1) for t in (a.tokens, b.tokens)]
        tokens = np.concatenate(padded, axis=1)
    of_phase = None
    if a.phase_counts is not None and b.phase_counts is not None:
        of_phase = a.phase_counts + b.phase_counts
    return RoutingWindow(a.counts + b.counts, pairs, tokens, of_phase)


def _thin(tokens: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """A uniform sample of rows, spread over time; unused rows are dropped first where all layers agree."""
    used = (tokens[:, :, 0] >= 0).any(axis=0)
    tokens = tokens[:, used] if used.any() else tokens
    if tokens.shape[1] <= limit:
        return np.ascontiguousarray(tokens)
    rows = np.sort(np.random.default_rng(seed).choice(tokens.shape[1], limit, replace=False))
    return np.ascontiguousarray(tokens[:, rows])
