"""What a layer's experts take in a decode pass, by how many slots have tokens and how many tokens there are.

    python -m bench.micro.expert_slots --out FILE.json [--jobs 12]

DeepGEMM's masked products as low-latency mode runs them (gate and up, then down; the activation between them left out),
in a CUDA graph, bf16 and FP8, on random values. A slot without tokens costs nothing; one with few costs its weights.
``--jobs``: as many processes compile the kernels first, each of which takes ten seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu.flags import need_gpus
from bench.gpu.precompile_experts import set_environment
from bench.harness.environment import now, provenance
from bench.harness.output_paths import result_file, write_result
from sglang_eplb_affinity.domain.errors import InputError

TOP_K = 8
BLOCK = 128  # values for each scale
REPLAYS, REPEATS = 20, 7


@dataclass(frozen=True)
class Shape:
    """Experts of one model, and the slots of a GPU that may have tokens."""

    name: str
    hidden: int
    width: int
    slots: tuple[int, ...]


SHAPES = (
    Shape("deepseek-v3", 7168, 2048, (8, 9, 12, 16, 24, 28, 32, 36)),
    Shape("h200-x2-auto", 4096, 640, (32, 36, 48)),
    Shape("qwen3-235b", 4096, 1536, (8, 9, 16, 17, 24, 32)),
)
DTYPES = ("bf16", "fp8")
TOKENS = (8, 32, 128, 256, 512)


@dataclass(frozen=True)
class Case:
    shape: str
    dtype: str
    slots: int  # that have tokens
    tokens: int  # of a GPU; each goes to TOP_K slots, dealt out evenly


def cases(only: str = "") -> Iterator[Case]:
    """Those that the figures need first; with ``only``, of SHAPE:DTYPE."""
    for shape in SHAPES:
        for dtype in DTYPES:
            if only and only != f"{shape.name}:{dtype}":
                continue
            for tokens in TOKENS:
                yield from (Case(shape.name, dtype, slots, tokens) for slots in shape.slots)


def rows_of_slots(case: Case, present: int) -> np.ndarray:
    """int32 [present]: tokens of each slot; the first ``case.slots`` share them."""
    rows = np.zeros(present, np.int32)
    inputs = case.tokens * TOP_K
    rows[: case.slots] = inputs // case.slots
    rows[: inputs % case.slots] += 1
    return rows


class Experts:
    """Weights of one shape and type, and the two products on them."""

    def __init__(self, shape: Shape, dtype: str, rows: int) -> None:
        self._fp8, self.present = dtype == "fp8", max(shape.slots)
        self._up = self._values(2 * shape.width, shape.hidden, weights=True)
        self._down = self._values(shape.hidden, shape.width, weights=True)
        self._tokens = self._values(rows, shape.hidden)
        self._middle = self._values(rows, shape.width)
        self._out_up = torch.empty(self.present, rows, 2 * shape.width, device="cuda", dtype=torch.bfloat16)
        self._out_down = torch.empty(self.present, rows, shape.hidden, device="cuda", dtype=torch.bfloat16)

    def _values(self, rows: int, columns: int, weights: bool = False) -> Any:
        values = torch.randn(self.present, rows, columns, device="cuda", dtype=torch.bfloat16)
        if not self._fp8:
            return values
        if weights:
            scales = torch.rand(self.present, rows // BLOCK, columns // BLOCK, device="cuda") + 0.5
        else:
            from deep_gemm.utils.layout import get_mn_major_tma_aligned_tensor

            scales = get_mn_major_tma_aligned_tensor(
                torch.rand(self.present, rows, columns // BLOCK, device="cuda") + 0.5
            )
        return values.to(torch.float8_e4m3fn), scales

    def products(self, masked: torch.Tensor, expected: int) -> Callable[[], None]:
        import deep_gemm

        multiply = deep_gemm.fp8_m_grouped_gemm_nt_masked if self._fp8 else deep_gemm.m_grouped_bf16_gemm_nt_masked

        def run() -> None:
            multiply(self._tokens, self._up, self._out_up, masked, expected)
            multiply(self._middle, self._down, self._out_down, masked, expected)

        return run


def microseconds(run: Callable[[], None]) -> list[float]:
    """Of one ``run`` in a CUDA graph, REPEATS times the mean over REPLAYS."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    found = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1000 * begin.elapsed_time(end) / REPLAYS)
    return found


def experts_of(case: Case) -> Experts:
    shape = next(shape for shape in SHAPES if shape.name == case.shape)
    largest = max(TOKENS) * TOP_K // min(shape.slots)
    return Experts(shape, case.dtype, -(-largest // BLOCK) * BLOCK)


def products_of(case: Case, experts: Experts) -> Callable[[], None]:
    masked = torch.from_numpy(rows_of_slots(case, experts.present)).cuda()
    return experts.products(masked, max(1, case.tokens * TOP_K // case.slots))


def compile_kernels(case: Case) -> None:
    """Run it once in this process: what it compiles stays in DeepGEMM's cache."""
    set_environment()
    products_of(case, experts_of(case))()
    torch.cuda.synchronize()


def measure(seconds: float, only: str = "") -> Iterator[dict[str, Any]]:
    """One row a case (``only``: of SHAPE:DTYPE); those that would begin after ``seconds`` are missing."""
    deadline = time.monotonic() + seconds
    experts: Experts | None = None
    made: tuple[str, str] | None = None
    for case in cases(only):
        if time.monotonic() > deadline:
            return
        if made != (case.shape, case.dtype):
            experts = None  # before the next ones are made
            torch.cuda.empty_cache()
            experts, made = experts_of(case), (case.shape, case.dtype)
        assert experts is not None
        times = microseconds(products_of(case, experts))
        yield {**asdict(case), "us": round(float(np.median(times)), 2), "us_min": min(times), "us_max": max(times)}


def entries(rows: Sequence[dict[str, Any]], source: dict[str, Any], date: str, command: str) -> list[dict[str, Any]]:
    """The ratio of 36 to 32 slots, DeepSeek-V3's experts in bf16, median over the numbers of tokens."""
    of = {(r["slots"], r["tokens"]): r["us"] for r in rows if (r["shape"], r["dtype"]) == ("deepseek-v3", "bf16")}
    ratios = [of[36, tokens] / of[32, tokens] for tokens in TOKENS if (36, tokens) in of and (32, tokens) in of]
    if not ratios:
        return []
    return [
        {
            "name": "decode.active_slots.time_ratio_36_to_32",
            "value": round(float(np.median(ratios)), 4),
            "lower": round(min(ratios), 4),
            "upper": round(max(ratios), 4),
            "unit": "ratio",
            "kind": "measured",
            "hardware": source["hardware"],
            "versions": source["versions"],
            "commit": source["commit"],
            "date": date,
            "command": command,
        }
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro.expert_slots", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=result_file, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    known = [f"{shape.name}:{dtype}" for shape in SHAPES for dtype in DTYPES]
    parser.add_argument("--only", default="", choices=["", *known], help="SHAPE:DTYPE")
    parser.add_argument("--jobs", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        need_gpus("bench.micro.expert_slots")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    set_environment()
    source, command = provenance(), "python -m bench.micro.expert_slots --out FILE.json"
    if options.jobs > 0:
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            list(pool.map(compile_kernels, cases(options.only)))
    rows: list[dict[str, Any]] = []
    out: Path = options.out
    for row in measure(options.seconds, options.only):
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_result(out, {"provenance": source, "command": command, "date": now(), "rows": rows})
    date = now()
    result = {"provenance": source, "command": command, "date": date, "rows": rows}
    write_result(out, {**result, "entries": entries(rows, source, date, command)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
