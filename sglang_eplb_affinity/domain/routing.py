"""Recorded routing: a trace of tokens, and the window of statistics that a planner works on."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.content import array_of, read_content
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.reading import name_of

MAX_EXPERTS = 4096
"""Most logical experts in a layer that files may name."""
MAX_PAIRS = 1 << 28
"""Most elements of a file's co-activation, layers x experts x experts."""


@dataclass(frozen=True)
class RoutingTrace:
    """Top-k choices of every token, with LOGICAL ids.

    ``topk_ids`` int16 [tokens, layers, k]; ``sequence`` int32 [tokens] and ``domain`` int8 [tokens] are optional.
    """

    topk_ids: np.ndarray
    num_experts: int
    sequence: np.ndarray | None = None
    domain: np.ndarray | None = None
    domain_names: tuple[str, ...] = ()
    source: str = "trace"

    def __post_init__(self) -> None:
        ids = self.topk_ids
        if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(
                f"{self.source}: topk_ids is {ids.dtype} of shape {ids.shape}, "
                "but must be integers of shape [tokens, layers, k]"
            )
        if not ids.size:
            raise InputError(f"{self.source}: topk_ids of shape {ids.shape} holds no tokens")
        if ids.min() < 0 or ids.max() >= self.num_experts:
            token, layer, k = np.argwhere((ids < 0) | (ids >= self.num_experts))[0]
            raise InputError(
                f"{self.source}: topk_ids[{token}, {layer}, {k}] is {ids[token, layer, k]}, "
                f"but ids must be 0 to {self.num_experts - 1} (num_experts is {self.num_experts})"
            )
        for name in ("sequence", "domain"):
            value = getattr(self, name)
            if value is not None and value.shape != (ids.shape[0],):
                raise InputError(
                    f"{self.source}: {name} has shape {value.shape}, but must be [{ids.shape[0]}] (tokens)"
                )

    @property
    def num_tokens(self) -> int:
        return int(self.topk_ids.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.topk_ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.topk_ids.shape[2])

    def select(self, rows: np.ndarray) -> RoutingTrace:
        """The trace of some tokens: ``rows`` is a boolean mask or an index array."""
        return RoutingTrace(
            self.topk_ids[rows],
            self.num_experts,
            None if self.sequence is None else self.sequence[rows],
            None if self.domain is None else self.domain[rows],
            self.domain_names,
            self.source,
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> RoutingTrace:
        """Read a .npz trace file (or its .gz); raises InputError that names the file and what is wrong."""
        source = name_of(path)
        arrays = read_content(path, source)
        if not isinstance(arrays, dict):
            raise InputError(f"{source}: holds a {type(arrays).__name__}, but a trace is an .npz file")
        for name in ("topk_ids", "num_experts"):
            if name not in arrays:
                found = ", ".join(sorted(map(str, arrays))[:8]) or "none"
                raise InputError(f"{source}: has no array {name!r} (found: {found})")
        experts = array_of(arrays["num_experts"], source, "num_experts")
        if experts.size != 1 or experts.dtype.kind not in "iu" or not 0 < int(experts.reshape(())) <= MAX_EXPERTS:
            raise InputError(f"{source}: num_experts must be one integer, 1 to {MAX_EXPERTS}")
        trace = RoutingTrace(
            array_of(arrays["topk_ids"], source, "topk_ids"),
            int(experts.reshape(())),
            _of_tokens(arrays.get("sequence"), source, "sequence"),
            _of_tokens(arrays.get("domain"), source, "domain"),
            _names(arrays.get("domain_names"), source),
            source,
        )
        if trace.num_layers * trace.num_experts**2 > MAX_PAIRS:
            raise InputError(
                f"{source}: has {trace.num_layers} layers of {trace.num_experts} experts; their co-activation is too "
                f"large ({MAX_PAIRS} elements at most)"
            )
        check_distinct(trace.topk_ids, f"{source}: topk_ids", ("token", "layer"))
        if trace.domain is not None and trace.domain_names and trace.domain.max() >= len(trace.domain_names):
            raise InputError(
                f"{source}: domain holds {trace.domain.max()}, but domain_names has {len(trace.domain_names)} names; "
                f"domains must be 0 to {len(trace.domain_names) - 1}"
            )
        return trace

    def save(self, path: str | os.PathLike[str]) -> None:
        arrays: dict[str, np.ndarray] = {
            "topk_ids": self.topk_ids.astype(np.int16),
            "num_experts": np.asarray(self.num_experts, dtype=np.int64),
        }
        if self.sequence is not None:
            arrays["sequence"] = self.sequence.astype(np.int32)
        if self.domain is not None:
            arrays["domain"] = self.domain.astype(np.int8 if self.domain.max(initial=0) < 128 else np.int32)
            arrays["domain_names"] = np.array(self.domain_names, dtype=np.str_)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomically(Path(path), buffer.getvalue())


def _of_tokens(value: Any, source: str, name: str) -> np.ndarray | None:
    """``sequence`` or ``domain`` of a trace: whole numbers from 0, one for each token."""
    if value is None:
        return None
    array = np.asarray(value)
    most = np.iinfo(np.int32).max
    if array.dtype.kind not in "iu" or (array.size and not 0 <= array.min() <= array.max() <= most):
        held = array.dtype if array.dtype.kind not in "iu" else f"{array.min()} to {array.max()}"
        raise InputError(f"{source}: {name} holds {held}, but must be numbers 0 to {most}, one for each token")
    return array


def _names(value: Any, source: str) -> tuple[str, ...]:
    if value is None:
        return ()
    array = np.asarray(value)
    if array.shape == (0,):
        return ()
    if array.dtype.kind != "U" or array.ndim != 1:
        raise InputError(f"{source}: domain_names is {array.dtype} of shape {array.shape}, but must be a list of texts")
    return tuple(array.tolist())


def check_distinct(ids: np.ndarray, name: str, axes: tuple[str, str]) -> None:
    """Raise InputError where an expert is twice in a token: ``ids`` int [.., .., k], -1 where unused."""
    for start in range(0, len(ids), 4096):
        ordered = np.sort(ids[start : start + 4096], axis=2)
        twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)
        if twice.any():
            row, column, k = np.argwhere(twice)[0]
            raise InputError(
                f"{name}[{start + row}, {column}] has expert {ordered[row, column, k]} twice; "
                f"the experts of a token in a layer must differ ([{axes[0]}, {axes[1]}])"
            )


@dataclass(frozen=True)
class RoutingWindow:
    """What one window of serving showed, summed over all ranks; the planner's input.

    ``counts`` int64 [layers, experts]: token-expert assignments, of every token.
    ``coactivation`` int64 [layers, experts, experts] or None: tokens that chose both experts; the diagonal is 0.
    ``tokens`` int16 [layers, sampled_tokens, k] or None: top-k sets of a uniform sample; rows of -1 are unused, and
    single ids of -1 are choices of no routed expert (LongCat-Flash's zero experts).
    ``phase_counts`` int64 [2, layers, experts] or None: the counts of prefill and of decode.
    ``token_phase`` int8 [sampled_tokens] or None: 0 for sampled tokens of prefill, 1 of decode, -1 for unused rows.
    ``earlier`` float32 [windows, layers, experts] or None: each expert's share of its layer's assignments in windows
    before this one, as :meth:`shares` gives them.
    """

    counts: np.ndarray
    coactivation: np.ndarray | None = None
    tokens: np.ndarray | None = None
    phase_counts: np.ndarray | None = None
    token_phase: np.ndarray | None = None
    earlier: np.ndarray | None = None

    def __post_init__(self) -> None:
        layers, experts = self.counts.shape
        if self.earlier is not None and self.earlier.shape[1:] != (layers, experts):
            raise InputError(
                f"routing window: earlier has shape {self.earlier.shape}, but must be [windows, {layers}, {experts}]"
            )
        if self.coactivation is not None and self.coactivation.shape != (layers, experts, experts):
            raise InputError(
                f"routing window: coactivation has shape {self.coactivation.shape}, "
                f"but counts say {(layers, experts, experts)}"
            )
        if self.tokens is not None:
            if self.tokens.ndim != 3 or self.tokens.shape[0] != layers:
                raise InputError(f"routing window: tokens has shape {self.tokens.shape}, but must be [{layers}, T, k]")
            if self.tokens.size and (self.tokens.max() >= experts or self.tokens.min() < -1):
                raise InputError(f"routing window: token sample has ids outside 0 to {experts - 1}")
        if self.phase_counts is not None and self.phase_counts.shape != (2, layers, experts):
            raise InputError(
                f"routing window: phase_counts has shape {self.phase_counts.shape}, but must be {(2, layers, experts)}"
            )
        if self.token_phase is not None and (self.tokens is None or self.token_phase.shape != self.tokens.shape[1:2]):
            raise InputError("routing window: token_phase must have one entry for each sampled token")

    def shares(self) -> np.ndarray:
        """float32 [layers, experts]: of each layer's assignments; zeros for a layer without traffic."""
        total = np.maximum(self.counts.sum(1, keepdims=True), 1)
        return np.asarray(self.counts / total, np.float32)

    @property
    def prefill_share(self) -> float | None:
        """The share of prefill in all tokens; None if phases were not recorded apart."""
        if self.phase_counts is None or not self.counts.any():
            return None
        return float(self.phase_counts[0].sum() / self.phase_counts.sum())

    @property
    def num_layers(self) -> int:
        return int(self.counts.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.counts.shape[1])

    @staticmethod
    def from_trace(trace: RoutingTrace, sample_size: int | None = None, seed: int = 0) -> RoutingWindow:
        """Counts and co-activation of all tokens; the token sample is uniform over the trace, not its start."""
        ids = np.ascontiguousarray(trace.topk_ids.transpose(1, 0, 2))
        counts = np.stack([np.bincount(layer.ravel(), minlength=trace.num_experts) for layer in ids]).astype(np.int64)
        sample = ids
        if sample_size is not None and sample_size < trace.num_tokens:
            rows = np.sort(np.random.default_rng(seed).choice(trace.num_tokens, sample_size, replace=False))
            sample = np.ascontiguousarray(ids[:, rows])
        return RoutingWindow(counts, coactivation_of(ids, trace.num_experts), sample.astype(np.int16))


def coactivation_of(tokens: np.ndarray, num_experts: int) -> np.ndarray:
    """int64 [layers, experts, experts] from token sets [layers, tokens, k]; ids of -1 are skipped, diagonal 0."""
    out = np.empty((len(tokens), num_experts, num_experts), dtype=np.int64)
    for layer, ids in enumerate(tokens):
        used = ids[(ids >= 0).any(1)]
        # float32 sums of ones are exact below 2**24 tokens; chunks keep it so for any trace.
        total = np.zeros((num_experts, num_experts), dtype=np.int64)
        for start in range(0, len(used), 1 << 16):
            chunk = used[start : start + (1 << 16)]
            hot = np.zeros((len(chunk), num_experts + 1), dtype=np.float32)  # the last column takes ids of -1
            np.put_along_axis(hot, chunk.astype(np.int64), 1.0, axis=1)
            hot = hot[:, :num_experts]
            total += (hot.T @ hot).astype(np.int64)
        np.fill_diagonal(total, 0)
        out[layer] = total
    return out


def estimated_coactivation(counts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """int64 [layers, experts, experts] for all tokens of a window, from its sample: exact if every token was sampled.

    ``counts`` int64 [layers, experts] of all tokens, ``tokens`` int16 [layers, sampled_tokens, k]. Pairs of the sample
    are scaled by all assignments over sampled ones, and rounded.
    """
    pairs = coactivation_of(tokens, counts.shape[1])
    sampled = (tokens >= 0).sum((1, 2))
    scale = counts.sum(1) / np.maximum(sampled, 1)
    return np.rint(pairs * scale[:, None, None]).astype(np.int64)
