"""The affinity recorder inside SGLang's expert distribution recorder: which rows of a batch are real tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from sglang_eplb_affinity.device.recorder import AffinityRecorder, RecorderConfig, RecordSchedule, RowLayout, one_group
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.formats.affinity_entry import window_to_dump
from sglang_eplb_affinity.rebalance.first_rank import this_rank
from sglang_eplb_affinity.rebalance.window_reduce import Reduction, reduce_window
from sglang_eplb_affinity.sglang_hooks import observing
from sglang_eplb_affinity.sglang_hooks.adapter import adapter
from sglang_eplb_affinity.sglang_hooks.load_log import LoadLog
from sglang_eplb_affinity.sglang_hooks.settings import Settings

logger = logging.getLogger(__name__)


class ServerRecorder:
    """One rank's recorder, and what it needs to know of SGLang's batches.

    Without an all-to-all backend every rank of an expert-parallel group runs all tokens of the batch, so one rank of
    the group records; with one, each rank routes tokens of its own and all record. Padding is never recorded.
    With an all-to-all and attention over several ranks, each of them routes an equal part of the pass's rows, padded to
    whatever SGLang runs (the length of the batch, or of a captured graph): all are told the whole pass.
    ``owner`` is SGLang's recorder, which knows whether recording is on.
    """

    def __init__(self, settings: Settings, expert_location_metadata: Any, owner: Any) -> None:
        from sglang.srt.runtime_context import get_parallel

        if settings.shape is None:
            raise InputError(f"--enable-expert-affinity-recorder: {settings.model_path} has no routed experts")
        parallel, recording = get_parallel(), settings.recording
        self.top_k = settings.shape.top_k
        self._num_groups = 1 if settings.own_tokens else max(parallel.attn_dp_size, 1)
        parts = parallel.attn_cp_size * parallel.attn_tp_size if settings.own_tokens else 1
        self._part = parallel.attn_cp_rank * parallel.attn_tp_size + parallel.attn_tp_rank if parts > 1 else 0
        self._reduction = Reduction(
            contributes=settings.own_tokens or (parallel.moe_ep_rank == 0 and parallel.moe_tp_rank == 0)
        )
        # EPLB plans on the same window: the HTTP endpoints must neither stop nor empty it.
        self.serves_eplb = settings.eplb
        self.records_from_start = bool(recording.log_passes)
        self._owner = owner
        self._schedule = RecordSchedule(recording.every, recording.last_passes, recording.interval)
        self._records_phase = recording.records_phase
        self._passes = 0
        self._records_pass = True
        self._on_cuda = settings.device.startswith("cuda")
        self.recorder = AffinityRecorder(
            num_layers=expert_location_metadata.num_layers,
            num_experts=expert_location_metadata.num_logical_experts,
            top_k=self.top_k,
            num_groups=self._num_groups,
            device=settings.device,
            config=RecorderConfig(
                sample_tokens=recording.sample_tokens,
                max_pass_tokens=recording.max_pass_tokens * self._num_groups,
                # Ranks run in lockstep: with one seed all would keep the tokens of the same positions. Those that
                # have parts of one pass must choose alike, so that their tokens make up one sample.
                seed=recording.seed + this_rank() - self._part,
                part_of_pass=parts > 1,
                # With EPLB on recording never stops, and all layers of the target model run inside a pass.
                quiet_between_passes=not self.serves_eplb or recording.speculative,
            ),
        )
        self._load_log = LoadLog(recording.log_passes, self.recorder, self._reduction)
        self._warned: set[str] = set()

    @property
    def own_recorder(self) -> AffinityRecorder | None:
        """The recorder of this rank's tokens; None if another rank records them."""
        return self.recorder if self._reduction.contributes else None

    def on_forward_pass_start(self, forward_batch: Any) -> None:
        if self._reduction.contributes:
            mode = forward_batch.forward_mode  # a speculative decode step verifies several tokens, as a short extend
            phase = 0 if mode.is_extend() and not mode.is_target_verify() else 1
            self._records_pass = self._schedule.records(self._passes) and self._records_phase(phase)
            self.recorder.begin_pass(self._tokens_of_groups(forward_batch), phase, self._records_pass)
        self._passes += 1

    def on_forward_pass_end(self) -> None:
        if self._reduction.contributes:
            self.recorder.end_pass()
        self._load_log.on_forward_pass_end()

    def rows_to_record(self, layer: int, num_rows: int) -> RowLayout | None:
        """How the rows of a layer's input map to the pass's tokens; None if they are not recorded here.

        A captured pass is replayed in other passes too, so there the device knows whether it counts; in other passes
        that do not count nothing is launched.
        """
        if not self._reduction.contributes or not layer < self.recorder.num_layers:
            return None
        if not self._records_pass and not self._is_captured():
            return None
        if not self._owner.records_affinity_now():
            return None
        return self._row_layout(num_rows)

    def _is_captured(self) -> bool:
        return torch.compiler.is_compiling() or (self._on_cuda and torch.cuda.is_current_stream_capturing())

    def reset(self) -> None:
        self._passes = 0
        self.recorder.reset()

    def window(self) -> RecordedWindow:
        """The window summed over ranks (a collective call); the same on every rank."""
        window = reduce_window(self.recorder, self._reduction)
        observing.window_recorded(window)
        return RecordedWindow(window)

    def _tokens_of_groups(self, forward_batch: Any) -> list[int]:
        if self._num_groups == 1:
            return [adapter().tokens_of_pass(forward_batch)]
        counts = forward_batch.global_num_tokens_cpu
        if counts is None or len(counts) != self._num_groups:
            self._warn("a batch without per-rank token counts is not recorded")
            return [0] * self._num_groups
        return [int(count) for count in counts]

    def _row_layout(self, num_rows: int) -> RowLayout | None:
        if self._num_groups == 1:
            return one_group(num_rows, self._part)
        from sglang.srt.layers.dp_attention import get_dp_global_num_tokens, is_dp_max_padding

        if is_dp_max_padding() and num_rows % self._num_groups == 0:
            return RowLayout((num_rows // self._num_groups,) * self._num_groups)
        padded = get_dp_global_num_tokens()
        if padded is not None and len(padded) == self._num_groups and sum(padded) == num_rows:
            return RowLayout(tuple(int(count) for count in padded))
        self._warn("a batch whose rows do not follow the data-parallel ranks is not recorded")
        return None

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("[eplb-affinity] %s", message)


@dataclass(frozen=True)
class RecordedWindow:
    """A window on its way into the recorder's output."""

    window: RoutingWindow

    def logical_count(self, device: Any) -> torch.Tensor:
        """int64 [1, layers, experts]: SGLang's key of the same name, with one step for the whole window."""
        return torch.from_numpy(self.window.counts).to(device)[None]

    def for_output(self, mode: str) -> RoutingWindow | dict[str, Any]:
        """For SGLang's output mode: plain tensors for a ``file``, the window itself for an ``object``."""
        return window_to_dump(self.window) if mode == "file" else self.window
