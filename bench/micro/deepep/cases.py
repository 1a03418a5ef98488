"""What is measured, in which order, and the routing of each case. Plain Python: needs neither a GPU nor DeepEP."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError

NORMAL_HIDDEN = (7168, 4096, 2048)
NORMAL_TOKENS = (4096, 1024, 8192, 256, 2048, 512)
LOW_LATENCY_TOKENS = (128, 32, 64, 8)
ELASTIC_TOKENS = (128, 8, 1, 64, 256, 32, 4096, 1024, 8192, 512, 2048)
# Tokens per GPU that a decode server's buffer is made for; what is above needs one as large as prefill's.
ELASTIC_DECODE_TOKENS = 256
DTYPES = ("fp8", "bf16")
# Sizes that DeepEP 1.2.1 compiles its low-latency kernels for (SWITCH_HIDDEN in csrc/kernels/launch.cuh).
LOW_LATENCY_HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)


@dataclass(frozen=True)
class Case:
    """One point. ``routing``: local, remote, spread (all fan-out 1), or the fan-out as text (``1.5``: half 1, half 2).

    ``tokens`` are per GPU; ``dtype`` is what dispatch sends (combine always sends bf16).
    """

    mode: str
    hidden: int
    dtype: str
    tokens: int
    routing: str

    @property
    def fanout(self) -> float:
        return 1.0 if self.routing in ("local", "remote", "spread") else float(self.routing)

    def bytes_per_copy(self) -> tuple[int, int]:
        """(dispatch, combine) payload bytes of one token copy; FP8 carries a float32 scale for 128 values."""
        fp8 = self.hidden + self.hidden // 128 * 4
        return (fp8 if self.dtype == "fp8" else self.hidden * 2), self.hidden * 2


def routings(num_gpus: int) -> tuple[str, ...]:
    """Every routing on ``num_gpus`` GPUs, the most telling first."""
    whole = tuple(str(f) for f in range(num_gpus, 1, -1))
    return ("spread", *whole, "local", "remote", "1.5")


def normal_cases(num_gpus: int, hidden: Sequence[int], tokens: Sequence[int], dtypes: Sequence[str]) -> Iterator[Case]:
    """All normal-mode points; if time runs out the first ones cover every size at the main routings."""
    kinds = routings(num_gpus)
    for part in (kinds[:2], kinds[2:]):
        for count, size, dtype, routing in itertools.product(tokens, hidden, dtypes, part):
            yield Case("normal", size, dtype, count, routing)


def low_latency_cases(
    num_gpus: int, hidden: Sequence[int], tokens: Sequence[int], dtypes: Sequence[str]
) -> Iterator[Case]:
    """Low-latency points: local, spread and the widest fan-out."""
    kinds = ("spread", str(num_gpus), "local") if num_gpus > 1 else ("local",)
    for size, count, dtype, routing in itertools.product(hidden, tokens, dtypes, kinds):
        yield Case("low_latency", size, dtype, count, routing)


def elastic_cases(num_gpus: int, hidden: Sequence[int], tokens: Sequence[int], dtypes: Sequence[str]) -> Iterator[Case]:
    """Points of DeepEP V2, in a graph and eagerly; if time runs out the first ones cover what decode does."""
    kinds = routings(num_gpus)
    for part in (("spread", str(num_gpus)), tuple(k for k in kinds if k not in ("spread", str(num_gpus)))):
        for mode, count, size, dtype, routing in itertools.product(
            ("v2_graph", "v2_eager"), tokens, hidden, dtypes, part
        ):
            yield Case(mode, size, dtype, count, routing)


def topk_ids(case: Case, rank: int, num_gpus: int, num_experts: int, top_k: int) -> np.ndarray:
    """int64 [tokens, top_k]: distinct experts of each token, with exactly the case's fan-out and even load.

    Expert e sits on GPU e // (experts per GPU). A token of fan-out f uses f neighbouring GPUs, starting from one that
    goes round with the token; its experts are dealt to them in turn.
    """
    per_gpu = num_experts // num_gpus
    token = np.arange(case.tokens)
    fan = np.full(case.tokens, int(case.fanout))
    if case.fanout != int(case.fanout):
        fan = np.where(token % 2 == 0, int(case.fanout), int(case.fanout) + 1)
    first = (rank + token // 2) % num_gpus
    if case.routing == "local":
        first = np.full(case.tokens, rank)
    elif case.routing == "remote":
        first = (rank + 1 + token % (num_gpus - 1)) % num_gpus
    if -(-top_k // int(fan.min())) > per_gpu:
        raise InputError(f"--experts: {num_experts} on {num_gpus} GPUs leave too few per GPU for top-{top_k}")
    slot = np.arange(top_k)[None, :]
    gpu = (first[:, None] + slot % fan[:, None]) % num_gpus
    expert = (token[:, None] * 7 + slot // fan[:, None]) % per_gpu
    return (gpu * per_gpu + expert).astype(np.int64)


def copies(ids: np.ndarray, rank: int, num_gpus: int, num_experts: int) -> tuple[float, float]:
    """(local, remote) destination GPUs per token: what normal mode copies."""
    hit = np.zeros((len(ids), num_gpus), bool)
    np.put_along_axis(hit, ids // (num_experts // num_gpus), True, axis=1)
    return float(hit[:, rank].mean()), float(np.delete(hit, rank, 1).sum(1).mean())
