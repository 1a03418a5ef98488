"""Reading the files that SGLang's expert distribution recorder writes, as the planner's routing window.

Told apart by their keys; ``.pt`` (``torch.save`` of a dict) or the same as JSON, or either as ``.gz``:

- ``stat``, ``stat_approx``: ``logical_count`` [steps, layers, experts] (or [layers, experts]): counts only;
- ours: the same plus ``affinity``, see :mod:`.affinity_entry`;
- ``per_pass``: ``records``, each with ``global_physical_count`` [layers, slots]: counts only;
- ``per_token``: ``records``, each with ``topk_ids_of_layer`` int32 [layers, tokens, k] of PHYSICAL ids (-1 unused).

The two last hold ``last_physical_to_logical_map`` [layers, slots], with which they are folded to logical ids. SGLang
notes that the map may have changed during recording, so record them without rebalances. One file per rank; give all.

For DeepSeek models ``layers`` counts the leading dense layers too; they have no traffic.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.content import array_of, read_content
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import MAX_EXPERTS, RoutingWindow, check_distinct, coactivation_of
from sglang_eplb_affinity.formats import affinity_entry

logger = logging.getLogger(__name__)

Note = Callable[[str], object]
"""Takes one line on what a reader had to decide about a file."""
_MOST_ASSIGNMENTS = 1 << 48
_SCALED_ASSIGNMENTS = 10_000_000
"""Assignments of the busiest layer that frequencies are scaled to."""


def read_dumps(
    paths: Sequence[str | os.PathLike[str]], sample_size: int = 8192, seed: int = 0, note: Note = logger.warning
) -> RoutingWindow:
    """One window from one or several dump files of the same model; raises InputError that names the file.

    Counts and co-activation are added up, so a file weighs as much as it has tokens; token samples are joined in the
    same proportion, at most ``sample_size`` tokens per layer.
    """
    windows = [(str(path), window_of(read_content(path), str(path), note)) for path in paths]
    first_path, first = windows[0]
    for path, window in windows[1:]:
        if window.counts.shape != first.counts.shape:
            raise InputError(
                f"{path}: has [layers, experts] {window.counts.shape}, but {first_path} has {first.counts.shape}"
            )
    if len(windows) > 1:
        note(_differences(windows))
    return _joined([window for _, window in windows], sample_size, seed)


def is_dump(data: Any) -> bool:
    """Whether a file's content is a recorder dump rather than a map."""
    keys = ("logical_count", "records", affinity_entry.KEY)
    return isinstance(data, dict) and "physical_to_logical_map" not in data and any(key in data for key in keys)


def window_of(data: Any, source: str, note: Note = logger.warning) -> RoutingWindow:
    """The window of one dump's content; ``source`` begins error messages."""
    if not isinstance(data, dict):
        raise InputError(f"{source}: holds a {type(data).__name__}, but a recorder dump is a dict")
    if affinity_entry.KEY in data:
        window = affinity_entry.window_of_dump(data[affinity_entry.KEY], source)
    elif "records" in data:
        window = _from_records(source, data)
    elif "logical_count" in data:
        window = RoutingWindow(_counts(source, "logical_count", data["logical_count"], note))
    else:
        raise InputError(
            f"{source}: not a recorder dump; expected the key logical_count, affinity or records, "
            f"found {', '.join(sorted(map(str, data))[:8]) or 'none'}"
        )
    if not 0 < window.num_experts <= MAX_EXPERTS:
        raise InputError(f"{source}: has {window.num_experts} experts; 1 to {MAX_EXPERTS} are read")
    return window


def _counts(source: str, name: str, value: Any, note: Note) -> np.ndarray:
    """int64 [layers, experts] of counts or frequencies with two axes, or three of which the first are steps."""
    array = array_of(value, source, name)
    if array.ndim not in (2, 3) or not array.size:
        raise InputError(f"{source}: {name} has shape {array.shape}, but must be [steps, layers, experts]")
    where = f"{source}: {name}[{', '.join(['{}'] * array.ndim)}] is {{}}, but counts must be "
    for bad, right in ((~np.isfinite(array), "numbers"), (array < 0, "0 or more"),
                       (array > _MOST_ASSIGNMENTS, f"at most {_MOST_ASSIGNMENTS}")):  # fmt: skip
        if bad.any():
            index = np.argwhere(bad)[0]
            raise InputError(where.format(*index, array[tuple(index)]) + right)
    if array.dtype.kind == "f" and (array != np.floor(array)).any():
        exact = array.astype(np.float64)
        exact = exact.sum(0) if exact.ndim == 3 else exact
        factor = _SCALED_ASSIGNMENTS / exact.sum(1).max()
        note(f"{source}: {name} holds frequencies, not counts; scaled by {factor:.6g} to counts")
        return np.rint(exact * factor).astype(np.int64)
    whole = array.astype(np.int64)
    return np.ascontiguousarray(whole.sum(0) if whole.ndim == 3 else whole)


def _from_records(source: str, data: dict[str, Any]) -> RoutingWindow:
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
        if count.min() < 0 or count.max() > _MOST_ASSIGNMENTS:
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
    counts = np.stack([np.bincount(layer[layer >= 0], minlength=experts) for layer in logical]).astype(np.int64)
    tokens = np.ascontiguousarray(logical, dtype=np.int16)
    check_distinct(tokens, f"{source}: topk_ids_of_layer", ("layer", "token"))
    return RoutingWindow(counts, coactivation_of(tokens, experts) if tokens.size else None, tokens)


def _differences(windows: Sequence[tuple[str, RoutingWindow]]) -> str:
    """One line: how far each file's expert loads are from the whole's, in the layer where they differ most."""
    total = np.sum([window.counts for _, window in windows], axis=0)
    mean = total / np.maximum(total.sum(1, keepdims=True), 1)
    apart = np.zeros((len(windows), len(total)))
    for number, (_, window) in enumerate(windows):
        seen = window.counts.sum(1, keepdims=True)
        apart[number] = np.where(seen[:, 0] > 0, np.abs(window.counts / np.maximum(seen, 1) - mean).sum(1) / 2, 0)
    weights = np.array([window.counts.sum() for _, window in windows], dtype=np.float64)
    by_layer = (apart * weights[:, None]).sum(0) / max(weights.sum(), 1)
    file, layer = np.unravel_index(int(apart.argmax()), apart.shape)
    return (
        f"{len(windows)} dumps, weighed by their tokens: {100 * by_layer.mean():.1f} % of a dump's assignments go to "
        f"other experts than in the whole (layer {by_layer.argmax()}: {100 * by_layer.max():.1f} %); most in "
        f"{windows[int(file)][0]} layer {layer}: {100 * apart.max():.1f} %"
    )


def _joined(windows: Sequence[RoutingWindow], limit: int, seed: int) -> RoutingWindow:
    def added(name: str) -> np.ndarray | None:
        parts = [getattr(window, name) for window in windows]
        return None if any(part is None for part in parts) else np.sum(parts, axis=0)

    counts = np.sum([window.counts for window in windows], axis=0)
    sampled = [(window, _used_rows(window.tokens)) for window in windows if window.tokens is not None]
    if not sampled:
        return RoutingWindow(counts, added("coactivation"), None, added("phase_counts"))
    rng = np.random.default_rng(seed)
    wanted = min(limit, sum(len(rows) for _, rows in sampled))
    weight = sum(int(window.counts.sum()) for window, _ in sampled)
    picked = []
    for window, rows in sampled:
        share = wanted if len(sampled) == 1 else round(wanted * int(window.counts.sum()) / max(weight, 1))
        picked.append(_drawn(rng, rows, share))
    k = max(window.tokens.shape[2] for window, _ in sampled if window.tokens is not None)
    tokens, phases = [], []
    for (window, _), rows in zip(sampled, picked, strict=True):
        assert window.tokens is not None
        tokens.append(np.pad(window.tokens[:, rows], ((0, 0), (0, 0), (0, k - window.tokens.shape[2])),
                             constant_values=-1))  # fmt: skip
        phases.append(None if window.token_phase is None else window.token_phase[rows])
    known = [phase for phase in phases if phase is not None]
    return RoutingWindow(
        counts, added("coactivation"), np.ascontiguousarray(np.concatenate(tokens, axis=1)), added("phase_counts"),
        np.concatenate(known) if len(known) == len(phases) else None,
    )  # fmt: skip


def _used_rows(tokens: np.ndarray) -> np.ndarray:
    used = (tokens[:, :, 0] >= 0).any(axis=0) if tokens.shape[2] else np.zeros(tokens.shape[1], bool)
    return np.flatnonzero(used) if used.any() else np.arange(tokens.shape[1])


def _drawn(rng: np.random.Generator, rows: np.ndarray, count: int) -> np.ndarray:
    """``count`` of ``rows``, in time order; rows repeat only where the file sampled fewer than its share."""
    if not len(rows) or count == len(rows):
        return rows
    if count < len(rows):
        return np.sort(rng.choice(rows, count, replace=False))
    repeated = np.tile(rows, count // len(rows))
    return np.sort(np.concatenate([repeated, rng.choice(rows, count % len(rows), replace=False)]))
