"""The recorded window of one rank, taken off the device without stopping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sglang_eplb_affinity.device.recorder import PHASES, AffinityRecorder
from sglang_eplb_affinity.rebalance.window_exchange import WindowShape


class RecorderWindow:
    """WindowSource of a rank's recorder.

    ``recorder`` is None on ranks that record nothing of their own. ``reset`` empties it and begins its schedule anew
    (--expert-affinity-record-last-passes counts from there).

    Taking a window is two small copies on the forward stream, into buffers made once (counts, and the sampled tokens in
    random order), and a copy to pinned memory on a side stream, which the next passes do not wait for.
    """

    def __init__(
        self,
        recorder: AffinityRecorder | None,
        reset: Callable[[], None],
        shape: WindowShape,
        device: torch.device,
        seed: int,
    ) -> None:
        self._recorder, self._reset, self._shape, self._device = recorder, reset, shape, device
        self._shuffled = np.random.default_rng(seed).permutation(shape.sample_tokens)
        self._stream: Any = None
        if recorder is None:
            return
        cuda = device.type == "cuda"
        counts = (len(PHASES), shape.num_layers, shape.num_experts)
        sample = (shape.num_layers, shape.sample_tokens, shape.top_k)
        self._device_counts = torch.empty(counts, dtype=torch.int64, device=device)
        self._device_sample = torch.empty(sample, dtype=torch.int16, device=device)
        self._counts = torch.empty(counts, dtype=torch.int64, pin_memory=cuda)
        self._sample = torch.empty(sample, dtype=torch.int16, pin_memory=cuda)
        self._order = torch.empty(shape.sample_tokens, dtype=torch.int64, pin_memory=cuda)
        if cuda:
            self._stream = torch.cuda.Stream(device)
            self._copied = torch.cuda.Event(blocking=True)

    @property
    def nbytes(self) -> int:
        """Device memory of the snapshot."""
        if self._recorder is None:
            return 0
        return self._device_counts.nbytes + self._device_sample.nbytes

    def start(self) -> None:
        if self._recorder is not None:
            self._reset()

    def take(self) -> Share:
        recorder = self._recorder
        if recorder is None:
            return Share(self._shape, None, None)
        seen = recorder.seen_tokens
        # Any first rows of a random order are a uniform sample, whatever share of it is asked for. One order serves all
        # windows, since drawing one takes a tenth of a millisecond from a pass; its rows in use come first.
        order = self._shuffled
        if seen < self._shape.sample_tokens:
            used = order < seen
            order = np.concatenate([order[used], order[~used]])
        self._order.numpy()[:] = order
        self._device_counts.copy_(recorder.counts)
        rows = self._order.to(self._device, non_blocking=True)
        torch.index_select(recorder.sample(), 1, rows, out=self._device_sample)
        self._reset()
        if self._stream is None:
            self._counts.copy_(self._device_counts)
            self._sample.copy_(self._device_sample)
            return Share(self._shape, self._read(seen), None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._counts.copy_(self._device_counts, non_blocking=True)
            self._sample.copy_(self._device_sample, non_blocking=True)
            self._copied.record(self._stream)
        return Share(self._shape, self._read(seen), self._copied)

    def _read(self, seen: int) -> Callable[[], tuple[int, np.ndarray, torch.Tensor]]:
        """What is known once the copies are there; ``seen`` was known when they began."""
        recorder = self._recorder
        assert recorder is not None

        def read() -> tuple[int, np.ndarray, torch.Tensor]:
            if not recorder.config.part_of_pass:
                return seen, self._counts.numpy(), self._sample[:, :seen]
            own, rows = recorder.own_tokens(self._counts, self._sample)
            return own, self._counts.numpy(), self._sample[:, torch.from_numpy(rows)]

        return read


class Share:
    """A window on its way to the host. Its buffers are the recorder window's: one round at a time."""

    def __init__(
        self, shape: WindowShape, read: Callable[[], tuple[int, np.ndarray, torch.Tensor]] | None, copied: Any
    ) -> None:
        self._shape, self._read, self._copied = shape, read, copied

    def wait(self) -> tuple[int, np.ndarray, torch.Tensor]:
        if self._read is None:
            empty = torch.empty(self._shape.num_layers, 0, self._shape.top_k, dtype=torch.int16)
            counts = (len(PHASES), self._shape.num_layers, self._shape.num_experts)
            return 0, np.zeros(counts, np.int64), empty
        if self._copied is not None:
            self._copied.synchronize()
        return self._read()
