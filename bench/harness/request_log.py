"""What the load generator saw of each request, and of itself: arrays small enough to keep for every row."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.files import write_atomically


@dataclass(frozen=True)
class RequestLog:
    """Requests in the order in which they were given, n of them; times in seconds, from ``epoch`` (Unix time) on.

    ``start``, ``ttft``, ``latency`` float64 [n]; ``input_tokens``, ``output_tokens`` int32 [n]; ``ok`` bool [n].
    A stream brings tokens in chunks (of one token each, unless the server has --stream-interval): ``gap`` float32 [m]
    is the time since the chunk before, ``gap_tokens`` uint16 [m] its tokens; request i has the chunks
    ``first_gap[i]`` to ``first_gap[i + 1]`` (int64 [n + 1]). The chunk with the first token is not among them.

    The load generator looks at itself every 10 ms, s times: ``sample_time`` float64 [s], its CPU time ``sample_cpu``
    float64 [s], and ``sample_lag`` float32 [s], how much later than asked its event loop got there.
    """

    epoch: float
    start: np.ndarray
    ttft: np.ndarray
    latency: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    ok: np.ndarray
    gap: np.ndarray
    gap_tokens: np.ndarray
    first_gap: np.ndarray
    sample_time: np.ndarray
    sample_cpu: np.ndarray
    sample_lag: np.ndarray

    @staticmethod
    def of_outputs(
        outputs: Sequence[Any], clock_zero: float, epoch: float, samples: Sequence[tuple[float, float, float]] = ()
    ) -> RequestLog:
        """From bench_serving's outputs and samples of (time, CPU time, lag); ``clock_zero`` is its clock's value at
        Unix time ``epoch``.

        bench_serving spreads a chunk's gap evenly over its tokens, so equal neighbours are one chunk.
        """
        gaps, tokens, first = [], [], [0]
        for output in outputs:
            for itl, same in groupby(output.itl):
                count = sum(1 for _ in same)
                gaps.append(itl * count)
                tokens.append(count)
            first.append(len(gaps))
        by_column = np.array(samples, dtype=np.float64).reshape(-1, 3).T
        return RequestLog(
            epoch=epoch,
            start=np.array([o.start_time for o in outputs], np.float64) - clock_zero,
            ttft=np.array([o.ttft for o in outputs], np.float64),
            latency=np.array([o.latency for o in outputs], np.float64),
            input_tokens=np.array([o.prompt_len for o in outputs], np.int32),
            output_tokens=np.array([o.output_len if o.success else 0 for o in outputs], np.int32),
            ok=np.array([o.success for o in outputs], bool),
            gap=np.array(gaps, np.float32),
            gap_tokens=np.array(tokens, np.uint16),
            first_gap=np.array(first, np.int64),
            sample_time=by_column[0] - clock_zero,
            sample_cpu=by_column[1],
            sample_lag=by_column[2].astype(np.float32),
        )

    def first(self, count: int) -> RequestLog:
        """The first ``count`` requests alone."""
        chunks = int(self.first_gap[count])
        of_requests = ("start", "ttft", "latency", "input_tokens", "output_tokens", "ok")
        own = {name: getattr(self, name)[:count] for name in of_requests}
        return replace(
            self,
            **own,
            gap=self.gap[:chunks],
            gap_tokens=self.gap_tokens[:chunks],
            first_gap=self.first_gap[: count + 1],
        )

    @property
    def first_tokens(self) -> np.ndarray:
        """float64 [n]: how many tokens came with each request's first text, usually 1.

        Tokens that make no text yet (half a character, a special token) show with the next one that does; the load
        generator, which sees text only, then takes that one's time for the first token's.
        """
        request = np.repeat(np.arange(len(self.start)), np.diff(self.first_gap))
        return np.asarray(self.output_tokens - np.bincount(request, self.gap_tokens, len(self.start)))

    @property
    def end(self) -> np.ndarray:
        """float64 [n]: when each request's last token had come."""
        return np.asarray(self.start + self.latency)

    def chunk_times(self) -> np.ndarray:
        """float64 [m]: when each chunk came."""
        per_request = np.diff(self.first_gap)
        running = np.cumsum(self.gap, dtype=np.float64)
        before = np.concatenate(([0.0], running))[self.first_gap[:-1]]
        return np.asarray(np.repeat(self.start + self.ttft - before, per_request) + running)

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{f.name: getattr(self, f.name) for f in fields(self)})
        write_atomically(path, buffer.getvalue())

    @staticmethod
    def load(path: Path) -> RequestLog:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        return RequestLog(**{**arrays, "epoch": float(arrays["epoch"])})
