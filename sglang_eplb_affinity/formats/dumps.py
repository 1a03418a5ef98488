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
from sglang_eplb_affinity.domain.reading import name_of
from sglang_eplb_affinity.domain.routing import MAX_EXPERTS, RoutingWindow
from sglang_eplb_affinity.formats import affinity_entry
from sglang_eplb_affinity.formats.records import MOST_ASSIGNMENTS, window_of_records
from sglang_eplb_affinity.formats.several import differences, joined

logger = logging.getLogger(__name__)

Note = Callable[[str], object]
"""Takes one line on what a reader had to decide about a file."""
_SCALED_ASSIGNMENTS = 10_000_000
"""Assignments of the busiest layer that frequencies are scaled to."""


def read_dumps(
    paths: Sequence[str | os.PathLike[str]], sample_size: int = 8192, seed: int = 0, note: Note = logger.warning
) -> RoutingWindow:
    """One window from one or several dump files of the same model; raises InputError that names the file.

    Counts and co-activation are added up, so a file weighs as much as it has tokens; token samples are joined in the
    same proportion, at most ``sample_size`` tokens per layer.
    """
    windows = [(name_of(path), window_of(read_content(path), name_of(path), note)) for path in paths]
    first_path, first = windows[0]
    for path, window in windows[1:]:
        if window.counts.shape != first.counts.shape:
            raise InputError(
                f"{path}: has [layers, experts] {window.counts.shape}, but {first_path} has {first.counts.shape}"
            )
    if len(windows) > 1:
        note(differences(windows))
    return joined([window for _, window in windows], sample_size, seed)


def dense_rows(window: RoutingWindow, dense_layers: int, source: str) -> int:
    """How many of the model's leading dense layers the window has (silent) rows for: all, or 0 if it leaves them out.

    Raises InputError where ``dense_layers`` cannot be right.
    """
    if dense_layers >= window.num_layers:
        raise InputError(f"--dense-layers {dense_layers}: but {source} has {window.num_layers} layers in all")
    busy = window.counts[:dense_layers].any(1)
    if busy.any() and not busy.all():
        raise InputError(f"--dense-layers {dense_layers}: but layer {busy.argmax()} of {source} has traffic")
    return 0 if busy.any() else dense_layers


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
        window = window_of_records(source, data)
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
                       (array > MOST_ASSIGNMENTS, f"at most {MOST_ASSIGNMENTS}")):  # fmt: skip
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
