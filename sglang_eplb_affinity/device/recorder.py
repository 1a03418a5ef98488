"""Expert-affinity recorder: which logical experts tokens choose together, in buffers of fixed size on the device.

For each MoE layer: counts per expert and phase, and a uniform sample of token top-k sets, of every real token of every
recorded pass. No call here waits for the device, so recording can be captured in a CUDA graph: what a replayed pass
needs to know (which rows are real tokens, which of them are sampled, whether it is recorded at all) is copied into one
small static buffer before the pass. Co-activations follow from the sample when a window is taken; computing them pass
by pass, as a matrix product of indicator rows, costs more than everything else here together.

:meth:`AffinityRecorder.record` is the plain torch form and the reference of the kernel in map_and_record_kernel.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch

from sglang_eplb_affinity.device.reservoir import TokenReservoir

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class RecorderConfig:
    """``sample_tokens``: sampled tokens kept per layer. ``max_pass_tokens``: tokens of a pass that can be sampled.

    ``quiet_between_passes``: rows that are recorded outside a pass count nothing. Costs a small kernel per pass; needed
    where a captured graph can be replayed outside a pass (draft models, recording that is switched on and off).
    ``part_of_pass``: a pass is told with all its tokens, but this rank has the rows of a part of them only, and the
    others (with the same seed) record the rest: which part, only the device knows, see :class:`RowLayout`.
    """

    sample_tokens: int = 8192
    max_pass_tokens: int = 65536
    seed: int = 0
    quiet_between_passes: bool = True
    part_of_pass: bool = False


@dataclass(frozen=True)
class RecordSchedule:
    """Which passes of a window are recorded: every ``every``-th of the ``last`` ones before pass ``window``.

    ``last`` None: of all. Passes are numbered from 0 since the window began.
    """

    every: int = 1
    last: int | None = None
    window: int = 0

    def records(self, number: int) -> bool:
        return number % self.every == 0 and (self.last is None or number >= self.window - self.last)


@dataclass(frozen=True)
class RowLayout:
    """How the rows of one layer's input map to tokens of the pass.

    Rows come in one group for each data-parallel rank of the batch, ``rows_of_group`` rows long, of which the first
    ``tokens of that group`` (given to :meth:`AffinityRecorder.begin_pass`) are real tokens and the rest padding.
    ``first_token``: of one group, which token of the pass the first row is, where other ranks have those before it.
    """

    rows_of_group: tuple[int, ...]
    first_token: int = 0

    @cached_property
    def num_rows(self) -> int:
        return sum(self.rows_of_group)

    @cached_property
    def row_number(self) -> int:
        """What the kernel is told: rows of each of several groups of the same length, of one group its first token."""
        return self.first_token if len(self.rows_of_group) == 1 else self.rows_of_group[0]

    @cached_property
    def is_even(self) -> bool:
        return len(set(self.rows_of_group)) == 1


@lru_cache(maxsize=1024)
def one_group(num_rows: int, part: int = 0) -> RowLayout:
    """Rows of one group, or of its ``part``-th part of equal length; kept, because it is asked for at every layer."""
    return RowLayout((num_rows,), part * num_rows)


class AffinityRecorder:
    """Statistics of one window on one rank. All tensors live on ``device`` and keep their address.

    ``counts`` int64 [phases, layers, experts]; ``sample_rows`` int16 [layers, sample_tokens + 1, top_k], the last row a
    dump for what is not sampled; ``state`` int32: phase, then for each group its tokens, its first token and its first
    row, then from ``slot_offset`` on the sample slot of each token of the pass (``sample_tokens`` for none).
    """

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
        self.num_layers, self.num_experts, self.top_k, self.num_groups = num_layers, num_experts, top_k, num_groups
        self.config = config
        self._reservoir = TokenReservoir(config.sample_tokens, config.seed)
        self.counts = torch.zeros(len(PHASES), num_layers, num_experts, dtype=torch.int64, device=device)
        self.sample_rows = torch.full(
            (num_layers, config.sample_tokens + 1, top_k), -1, dtype=torch.int16, device=device
        )
        self.slot_offset = (1 + 3 * num_groups + 3) // 4 * 4
        # One entry more than tokens, for rows that are no real token and for tokens beyond max_pass_tokens.
        size = self.slot_offset + config.max_pass_tokens + 1
        self.state = torch.full((size,), config.sample_tokens, dtype=torch.int32, device=device)
        self.state[: self.slot_offset] = 0
        self._pinned = self.state.is_cuda
        self._header: tuple[int, ...] = (0,) * (1 + num_groups)
        self._slots_free = config.max_pass_tokens  # so many slots on the device are known to say "none"
        self._uneven: RowLayout | None = None
        self._sample_phase = np.zeros(config.sample_tokens, dtype=np.int8)
        self._taken_counts = torch.zeros_like(self.counts)
        self._kept_counts = torch.zeros_like(self.counts)

    @property
    def seen_tokens(self) -> int:
        """Real tokens of the recorded passes of the window so far (known on the host)."""
        return self._reservoir.seen

    def own_tokens(self, counts: torch.Tensor, sample: torch.Tensor) -> tuple[int, np.ndarray]:
        """(real tokens that this rank recorded, int64 [sampled]: rows of ``sample`` that hold one of them).

        ``counts`` and ``sample`` are those of the window on the host or the device; looked at, which waits for the
        device, only where the host does not know (``part_of_pass``).
        """
        if not self.config.part_of_pass:
            return self.seen_tokens, np.arange(min(self.seen_tokens, self.config.sample_tokens))
        recorded = int(counts.sum((0, 2)).max()) // self.top_k
        return recorded, np.flatnonzero((sample >= 0).any(2).any(0).cpu().numpy())

    def reset(self) -> None:
        """Start an empty window."""
        self._kept_counts += self.counts - self._taken_counts
        self._taken_counts.zero_()
        self._reservoir.reset()
        self.counts.zero_()
        self.sample_rows.fill_(-1)
        self._say((0,) * (1 + self.num_groups), self._reservoir.offer(0))

    def begin_pass(self, group_tokens: list[int], phase: int = 0, record: bool = True) -> None:
        """Say how many real tokens each group of the coming pass has (see :class:`RowLayout`), and its phase.

        With ``record`` False the pass runs unrecorded: same kernels, nothing counted.
        """
        tokens = group_tokens if record else [0] * self.num_groups
        taken = self._reservoir.offer(sum(tokens))
        if len(taken[1]):
            self._sample_phase[taken[1]] = phase
            if self.config.part_of_pass and self._reservoir.seen > self.config.sample_tokens:
                self._empty(taken[1])
        self._say((phase, *tokens), taken)

    def end_pass(self) -> None:
        """After this, rows recorded outside a pass (warm-up, graph capture) count nothing."""
        if self.config.quiet_between_passes and any(self._header[1:]):
            self._header = (0,) * (1 + self.num_groups)
            self.state[1 : 1 + self.num_groups].zero_()

    def _empty(self, slots: np.ndarray) -> None:
        """Rows of the sample whose new token may be another rank's, which does not overwrite them here."""
        news = torch.empty(len(slots), dtype=torch.int64, pin_memory=self._pinned)
        news.numpy()[:] = slots
        self.sample_rows.index_fill_(1, news.to(self.state.device, non_blocking=True), -1)

    def _say(self, header: tuple[int, ...], taken: tuple[np.ndarray, np.ndarray]) -> None:
        """Copy to the device what changed, in one copy that does not wait."""
        tokens, slots = taken
        all_tokens = sum(header[1:])
        total = min(all_tokens, self.config.max_pass_tokens)
        if header == self._header and not len(tokens) and total <= self._slots_free:
            return
        news = torch.empty(self.slot_offset + total, dtype=torch.int32, pin_memory=self._pinned)
        values = news.numpy()
        values[: self.slot_offset] = self._numbers_of(header)
        slot_of_token = values[self.slot_offset :]
        if len(tokens) == all_tokens == total:  # every token, in order
            slot_of_token[:] = slots
        else:
            slot_of_token[:] = self.config.sample_tokens
            if all_tokens > total:
                inside = tokens < total
                tokens, slots = tokens[inside], slots[inside]
            slot_of_token[tokens] = slots
        # PyTorch keeps pinned memory until the copy is done.
        self.state[: len(values)].copy_(news, non_blocking=True)
        self._header, self._uneven = header, None
        self._slots_free = 0 if len(tokens) else max(self._slots_free, total)

    def _numbers_of(self, header: tuple[int, ...]) -> list[int]:
        """The head of ``state``; where each group's rows begin is only said for groups of different length."""
        first_tokens = [0, *accumulate(header[1:-1])]
        return [*header, *first_tokens, *[0] * (self.slot_offset - len(header) - len(first_tokens))]

    def say_uneven_rows(self, rows: RowLayout) -> None:
        """For groups of different length: where each begins. Copies to the device, so it cannot be captured."""
        if rows != self._uneven:
            first = np.cumsum((0, *rows.rows_of_group[:-1]), dtype=np.int32)
            groups = self.num_groups
            self.state[1 + 2 * groups : 1 + 3 * groups].copy_(torch.from_numpy(first))
            self._uneven = rows

    def record(
        self, layer: int, topk_ids: torch.Tensor, rows: RowLayout, num_valid_rows: torch.Tensor | None = None
    ) -> None:
        """Add one layer's choices.

        ``topk_ids`` [rows, >= top_k] LOGICAL ids of any integer type; columns beyond ``top_k`` (fused shared experts)
        are left out, as are ids that are no expert's: -1, or LongCat-Flash's zero experts behind the others.
        ``num_valid_rows`` is a device scalar where only the device knows the number.
        """
        if topk_ids.shape[0] == 0:
            return
        ids = topk_ids[:, : self.top_k].long()
        ids = torch.where(ids < self.num_experts, ids, -1)
        valid, slots = self._resolve_rows(rows, num_valid_rows)
        counted = valid[:, None] & (ids >= 0)
        phase_and_layer = self.state[0].long() * self.num_layers + layer
        index = phase_and_layer * self.num_experts + ids.clamp(min=0)
        self.counts.view(-1).index_add_(0, index.flatten(), counted.long().flatten())
        self.sample_rows[layer].index_copy_(0, slots, ids.to(torch.int16))

    def _resolve_rows(self, rows: RowLayout, num_valid_rows: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows are recorded (bool [rows]), and the sample slot of each (int64 [rows])."""
        device, groups = self.state.device, self.num_groups
        row = torch.arange(rows.num_rows, device=device)
        if rows.is_even:  # no host-to-device copy, so that it can be captured
            length = max(rows.rows_of_group[0], 1)
            group, position = row // length, row % length + rows.first_token
        else:
            self.say_uneven_rows(rows)
            first = self.state[1 + 2 * groups : 1 + 3 * groups]
            group = (row[:, None] >= first[None, 1:]).sum(1)
            position = row - first[group]
        valid = position < self.state[1 : 1 + groups][group]
        if num_valid_rows is not None:
            valid &= row < num_valid_rows
        token = self.state[1 + groups : 1 + 2 * groups][group] + position
        last = self.config.max_pass_tokens
        slot_of_token = self.state[self.slot_offset :]
        return valid, slot_of_token[torch.where(valid, token, last).clamp_(max=last)].long()

    def take_phase_counts(self) -> torch.Tensor:
        """int64 [phases, layers, experts] of this rank since the last call, over the ends of windows."""
        counts = self._kept_counts + self.counts - self._taken_counts
        self._taken_counts.copy_(self.counts)
        self._kept_counts.zero_()
        return counts

    def sample(self) -> torch.Tensor:
        """int16 [layers, sample_tokens, top_k] of this rank; unused rows are -1."""
        return self.sample_rows[:, :-1]

    def sample_phase(self) -> np.ndarray:
        """int8 [sample_tokens]: the phase (index into PHASES) in which each sampled token came."""
        return self._sample_phase
