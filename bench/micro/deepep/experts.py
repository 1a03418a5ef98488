"""Time of the experts themselves: a grouped matrix product in bf16, even and uneven tokens per expert."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.micro.deepep.timing import Repeats, summarise, time_stages

SHAPES = ((7168, 2048, 8), (4096, 1536, 16), (2048, 1024, 32))  # hidden, intermediate, experts on the GPU
TOKENS_PER_EXPERT = (4, 16, 64, 256, 1024)


def rows(plan: Repeats) -> Iterator[dict[str, Any]]:
    """One row per shape, size and skew: gate-and-up product, then down product, without the activation."""
    for hidden, intermediate, experts in SHAPES:
        up = torch.randn(experts, hidden, 2 * intermediate, dtype=torch.bfloat16, device="cuda") * 0.02
        down = torch.randn(experts, intermediate, hidden, dtype=torch.bfloat16, device="cuda") * 0.02
        for tokens in TOKENS_PER_EXPERT:
            for skew in ("even", "one expert gets half"):
                counts = np.full(experts, tokens)
                if skew != "even":
                    counts[:] = max(1, tokens * experts // (2 * (experts - 1)) // 8 * 8)
                    counts[0] = tokens * experts - counts[1:].sum()
                offsets = torch.from_numpy(np.cumsum(counts).astype(np.int32)).cuda()
                x = torch.randn(int(counts.sum()), hidden, dtype=torch.bfloat16, device="cuda")
                middle = torch.randn(int(counts.sum()), intermediate, dtype=torch.bfloat16, device="cuda")
                times = time_stages(
                    [
                        partial(torch._grouped_mm, x, up, offs=offsets),
                        partial(torch._grouped_mm, middle, down, offs=offsets),
                    ],
                    plan,
                )
                yield {
                    "hidden": hidden,
                    "intermediate": intermediate,
                    "experts": experts,
                    "tokens": int(counts.sum()),
                    "skew": skew,
                    "up_us": summarise(times[0]),
                    "down_us": summarise(times[1]),
                }
