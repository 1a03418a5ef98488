"""Compile DeepGEMM's kernels for a model's experts side by side, on the GPU host, while its servers import and load.

    python -m bench.gpu.precompile_experts --slots 32,36,48 --hidden 4096 --width 640 --batches 8,32,64,128,256

A server compiles them one after another when it first needs them, ten seconds each. ``--slots``: physical experts a
GPU, one kernel each; ``--batches``: decode batches a GPU, for the masked products of low-latency mode. All in bf16.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

TOP_K = 8
MASKED_ROWS = 512  # of an expert's buffer; its kernels do not depend on it
PREFILL_ROWS = (4096, 16384, 65536)


@dataclass(frozen=True)
class Product:
    """One grouped product of shape [rows, inner] x [slots, outer, inner]; ``expected`` rows a slot, 0: contiguous."""

    slots: int
    outer: int
    inner: int
    rows: int
    expected: int = 0


def products(slots: Sequence[int], hidden: int, width: int, batches: Sequence[int], ranks: int) -> list[Product]:
    """Both products of every expert layer, without those that ask for the same kernel by the same numbers."""
    found = []
    for count, (outer, inner) in product(slots, ((2 * width, hidden), (hidden, width))):
        expected = {(batch * ranks * TOP_K + count * ranks) // (count * ranks) for batch in batches}
        found += [Product(count, outer, inner, MASKED_ROWS, rows) for rows in sorted(expected)]
        found += [Product(count, outer, inner, rows) for rows in PREFILL_ROWS]
    return found


def compile_product(wanted: Product) -> str:
    """Run it once on random values; returns its line."""
    import torch

    set_environment()
    import deep_gemm

    began = time.monotonic()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    try:
        weights = random(wanted.slots, wanted.outer, wanted.inner)
        if wanted.expected:
            tokens = random(wanted.slots, wanted.rows, wanted.inner)
            out = tokens.new_empty(wanted.slots, wanted.rows, wanted.outer)
            masked = torch.full((wanted.slots,), wanted.expected, device="cuda", dtype=torch.int32)
            deep_gemm.m_grouped_bf16_gemm_nt_masked(tokens, weights, out, masked, wanted.expected)
        else:
            tokens, out = random(wanted.rows, wanted.inner), weights.new_empty(wanted.rows, wanted.outer)
            group = torch.arange(wanted.rows, device="cuda", dtype=torch.int32) // 128 % wanted.slots
            deep_gemm.m_grouped_bf16_gemm_nt_contiguous(tokens, weights, out, group.sort().values.int())
        torch.cuda.synchronize()
        result = "there"
    except Exception as error:  # a kernel that does not compile here is the server's to report
        result = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    torch.cuda.empty_cache()
    return f"{wanted}: {result}, {time.monotonic() - began:.1f} s"


def set_environment() -> None:
    """As SGLang's sglang/srt/layers/deep_gemm_wrapper/compile_utils.py sets it: the cache's names depend on it."""
    folder = os.getenv("SGLANG_DG_CACHE_DIR", str(Path.home() / ".cache" / "deep_gemm"))
    os.environ["DG_JIT_CACHE_DIR"] = folder
    os.environ["DG_JIT_USE_NVRTC"] = os.getenv("SGL_DG_USE_NVRTC", "0")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.precompile_experts", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--slots", type=numbers, required=True)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--batches", type=numbers, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=12)
    options = parser.parse_args(arguments)
    wanted = products(options.slots, options.hidden, options.width, options.batches, options.ranks)
    with ProcessPoolExecutor(min(options.jobs, len(wanted)), get_context("spawn")) as pool:
        for line in pool.map(compile_product, wanted):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
