"""Several windows of one model as one: the ranks of a server, or the hours of a day."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_eplb_affinity.domain.routing import RoutingWindow


def differences(windows: Sequence[tuple[str, RoutingWindow]]) -> str:
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


def joined(windows: Sequence[RoutingWindow], limit: int, seed: int) -> RoutingWindow:
    """One window: counts added up, token samples drawn in the same proportion, at most ``limit`` tokens."""

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
