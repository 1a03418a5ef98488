"""Log probabilities of a checkpoint in float32 by transformers, without expert parallelism, to measure errors by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Reference:
    """Qwen3Moe from ``folder``, unsharded, on ``device``. float32 without TF32 is exact next to a server's bfloat16."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.backends.cuda.matmul.allow_tf32 = False
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        self._model, self._device = model.to(device).eval(), device
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """float64 [sequences, tokens - 1]: of each token but the first, given those before it. All are as long."""
        found = self._known
        new = [key for key in dict.fromkeys(map(tuple, sequences)) if key not in found]
        if new:
            found.update(zip(new, self._compute(new), strict=True))
        return np.stack([found[tuple(sequence)] for sequence in sequences])

    def _compute(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        ids = torch.tensor([list(sequence) for sequence in sequences], device=self._device)
        with torch.inference_mode():
            logprobs = torch.log_softmax(self._model(input_ids=ids).logits[:, :-1].double(), -1)
            return np.asarray(logprobs.gather(-1, ids[:, 1:, None])[..., 0].cpu().numpy())

    @contextmanager
    def swapped(self, layer: int, first: int, second: int) -> Iterator[None]:
        """Inside, two experts of one layer have each other's weights, as after a rebalance that went wrong."""
        self._swap(layer, first, second)
        known, self._known = self._known, {}
        try:
            yield
        finally:
            self._swap(layer, first, second)
            self._known = known

    def _swap(self, layer: int, first: int, second: int) -> None:
        experts = self._model.model.layers[layer].mlp.experts
        with torch.no_grad():
            for weights in (experts.gate_up_proj, experts.down_proj):
                weights[[first, second]] = weights[[second, first]]
