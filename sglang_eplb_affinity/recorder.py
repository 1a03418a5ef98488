"""Expert-affinity recorder: which logical experts tokens choose together, in buffers of fixed size on the device.

For each MoE layer: expert counts, the co-activation matrix and a uniform sample of token top-k sets, of every real
token of every forward pass. One matrix product per layer gives both counts (its diagonal) and co-activation.
No call here waits for the device, so recording can be captured in a CUDA graph: what a replayed pass needs to know
(which rows are real tokens, which of them are sampled) is copied into static buffers before the pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class RecorderConfig:
    """``sample_tokens``: sampled tokens kept per layer. ``max_pass_tokens``: tokens of a pass that can be sampled.

    ``phases``: also count tokens per expert apart for each phase, 0 to phases - 1, that begin_pass names.
    """

    sample_tokens: int = 8192
    max_pass_tokens: int = 65536
    seed: int = 0
    phases: int = 0


class TokenReservoir:
    """Uniform sample without replacement of a stream of tokens (Vitter's algorithm R), decided on the host.

    The host knows how many tokens a pass has, so the choice costs the device nothing, is the same for all layers,
    and gives every token of the window the same chance however long the window is.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self._capacity = capacity
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        self._random = np.random.default_rng(self._seed)
        self.seen = 0

    def offer(self, num_tokens: int) -> np.ndarray:
        """int64 [num_tokens]: the slot that each token of the pass takes, ``capacity`` for none."""
        position = np.arange(self.seen, self.seen + num_tokens)
        drawn = np.floor(self._random.random(num_tokens) * (position + 1)).astype(np.int64)
        slots = np.where(position < self._capacity, position, np.minimum(drawn, self._capacity))
        # Of two tokens of one pass that draw the same slot the later one stays, as if they had come one by one.
        _, last = np.unique(slots[::-1], return_index=True)
        keep = np.zeros(num_tokens, dtype=bool)
        keep[num_tokens - 1 - last] = True
        self.seen += num_tokens
        return np.where(keep, slots, self._capacity)


@dataclass(frozen=True)
class RowLayout:
    """How the rows of one layer's input map to tokens of the pass.

    Rows come in one group for each data-parallel rank of the batch, ``rows_of_group`` rows long, of which the first
    ``tokens of that group`` (given to :meth:`AffinityRecorder.begin_pass`) are real tokens and the rest padding.
    """

    rows_of_group: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return sum(self.rows_of_group)


class AffinityRecorder:
    """Statistics of one window on one rank. All tensors live on ``device`` and keep their address."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        top_k: int,
        num_groups: int = 1,
        device: torch.device | str = "cpu",
        config: RecorderConfig = RecorderConfig(),
    ) -> None:
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.config = config
        self._reservoir = TokenReservoir(config.sample_tokens, config.seed)
        square = (num_layers, num_experts, num_experts)
        # float32 sums of ones are exact up to 2**24; begin_pass moves them to the int64 totals before that.
        self._recent = torch.zeros(square, dtype=torch.float32, device=device)
        self._total = torch.zeros(square, dtype=torch.int64, device=device)
        self._recent_tokens = 0
        # One more row than the sample holds: what is not sampled goes there.
        self._sample = torch.full((num_layers, config.sample_tokens + 1, top_k), -1, dtype=torch.int16, device=device)
        self._group_tokens = torch.zeros(num_groups, dtype=torch.int64, device=device)
        self._group_start = torch.zeros(num_groups, dtype=torch.int64, device=device)
        # The last entry is for rows that are not real tokens and for tokens beyond max_pass_tokens.
        self._slot_of_token = torch.full(
            (config.max_pass_tokens + 1,), config.sample_tokens, dtype=torch.int64, device=device
        )
        self._phase_counts = torch.zeros(config.phases * num_layers * num_experts, dtype=torch.int64, device=device)
        self._phase_start = torch.zeros((), dtype=torch.int64, device=device)
        self._rows: tuple[RowLayout, torch.Tensor, torch.Tensor] | None = None
        self._last_layer = num_layers

    @property
    def seen_tokens(self) -> int:
        """Real tokens of the window so far on this rank (known on the host)."""
        return self._reservoir.seen

    def reset(self) -> None:
        """Start an empty window."""
        self._reservoir.reset()
        self._recent.zero_()
        self._total.zero_()
        self._recent_tokens = 0
        self._sample.fill_(-1)
        self.end_pass()

    def begin_pass(self, group_tokens: list[int], phase: int = 0) -> None:
        """Say how many real tokens each group of the coming pass has (see :class:`RowLayout`), and its phase."""
        total = sum(group_tokens)
        if self.config.phases:
            self._phase_start.fill_(phase * self.num_layers * self.num_experts)
        if self._recent_tokens + total >= 1 << 24:
            self._flush()
        self._recent_tokens += total
        sampled = min(total, self.config.max_pass_tokens)
        slots = self._reservoir.offer(total)[:sampled]
        start = np.cumsum([0, *group_tokens[:-1]])
        self._copy(self._group_tokens, np.asarray(group_tokens))
        self._copy(self._group_start, start)
        self._copy(self._slot_of_token[:sampled], slots)
        self._rows = None
        self._last_layer = self.num_layers

    def end_pass(self) -> None:
        """Forget the pass: rows recorded from now on (warm-up, graph capture) count nothing."""
        self._group_tokens.zero_()
        self._rows = None

    def record(
        self, layer: int, topk_ids: torch.Tensor, rows: RowLayout, num_valid_rows: torch.Tensor | None = None
    ) -> None:
        """Add one layer's choices.

        ``topk_ids`` [rows, >= top_k] LOGICAL ids of any integer type; columns beyond ``top_k`` (fused shared experts)
        are left out. ``num_valid_rows`` is a device scalar for layouts whose count only the device knows.
        """
        if topk_ids.shape[0] == 0:
            return
        ids = topk_ids[:, : self.top_k]
        valid, slots = self._resolve_rows(layer, rows, num_valid_rows)
        hot = torch.zeros(ids.shape[0], self.num_experts, dtype=torch.float32, device=ids.device)
        hot.scatter_(1, ids.long(), valid.to(torch.float32).unsqueeze(1).expand(ids.shape))
        self._recent[layer].addmm_(hot.t(), hot)
        self._sample[layer].index_copy_(0, slots, ids.to(torch.int16))
        if self.config.phases:
            index = self._phase_start + layer * self.num_experts + ids.long()
            self._phase_counts.index_add_(0, index.flatten(), valid.long().unsqueeze(1).expand(ids.shape).flatten())

    def take_phase_counts(self) -> torch.Tensor:
        """int64 [phases, layers, experts] of this rank since the last call."""
        counts = self._phase_counts.clone().view(self.config.phases, self.num_layers, self.num_experts)
        self._phase_counts.zero_()
        return counts

    def _resolve_rows(
        self, layer: int, rows: RowLayout, num_valid_rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows are real tokens, and the sample slot of each; computed at the first layer of a pass."""
        if self._rows is not None and self._rows[0] == rows and layer > self._last_layer:
            self._last_layer = layer
            return self._rows[1], self._rows[2]
        device = self._group_tokens.device
        lengths = rows.rows_of_group
        if len(set(lengths)) == 1:  # no host-to-device copy, so that it can be captured
            row = torch.arange(rows.num_rows, device=device)
            group, position = row // max(lengths[0], 1), row % max(lengths[0], 1)
        else:
            group = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
            position = torch.cat([torch.arange(length) for length in lengths]).to(device)
        valid = position < self._group_tokens[group]
        if num_valid_rows is not None:
            valid &= torch.arange(rows.num_rows, device=device) < num_valid_rows
        token = self._group_start[group] + position
        last = self.config.max_pass_tokens
        slots = self._slot_of_token[torch.where(valid, token, last).clamp_(max=last)]
        self._rows, self._last_layer = (rows, valid, slots), layer
        return valid, slots

    def _flush(self) -> None:
        self._total += self._recent.to(torch.int64)
        self._recent.zero_()
        self._recent_tokens = 0

    def _copy(self, target: torch.Tensor, values: np.ndarray) -> None:
        target.copy_(torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)), non_blocking=True)

    def totals(self) -> torch.Tensor:
        """int64 [layers, experts, experts] of this rank: counts on the diagonal, co-activations beside it."""
        self._flush()
        return self._total

    def sample(self) -> torch.Tensor:
        """int16 [layers, sample_tokens, top_k] of this rank; unused rows are -1."""
        return self._sample[:, :-1]
