"""The simulator's time of experts against measured ones (``python -m bench.micro.expert_slots``)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.micro.expert_slots import SHAPES, Case, rows_of_slots
from sglang_eplb_affinity.simulate.expert_time import masked_products_us
from sglang_eplb_affinity.simulate.system import Gpu, Model, load_system

MEASURED = ("results/decode/expert-slots-h200.json", "results/decode/expert-slots-qwen3-h200.json")


@dataclass(frozen=True)
class ExpertTime:
    """One case, measured and simulated, in us of both products."""

    case: Case
    measured_us: float
    model_us: float

    @property
    def error_pct(self) -> float:
        return 100 * (self.model_us / self.measured_us - 1)


def measured(root: Path) -> Iterator[tuple[Case, float]]:
    """Every case of the files, and its us."""
    for path in MEASURED:
        for row in json.loads((root / path).read_text())["rows"]:
            yield Case(row["shape"], row["dtype"], row["slots"], row["tokens"]), row["us"]


def inputs_of(case: Case) -> tuple[np.ndarray, Model, Gpu]:
    """What the time model is asked: rows [1, slots], and the GPU of the H200 presets."""
    system = load_system("deepseek-v3-h200")
    shape, fp8 = next(shape for shape in SHAPES if shape.name == case.shape), case.dtype == "fp8"
    model = dataclasses.replace(
        system.model, hidden=shape.hidden, intermediate=shape.width, expert_bytes_per_weight=1.0 if fp8 else 2.0
    )
    rates = system.gpu.expert_tflops if fp8 else system.gpu.bf16_tflops
    rows = rows_of_slots(case, max(shape.slots))[None].astype(np.float64)
    return rows, model, dataclasses.replace(system.gpu, expert_tflops=rates)


def compare(root: Path) -> list[ExpertTime]:
    found = []
    for case, us in measured(root):
        rows, model, gpu = inputs_of(case)
        found.append(ExpertTime(case, us, float(masked_products_us(rows, model, gpu)[0])))
    return found


def largest(times: Sequence[ExpertTime]) -> float:
    return max(abs(time.error_pct) for time in times)


def table(times: Sequence[ExpertTime]) -> str:
    """Markdown: median and largest error of each shape and type, and the worst case."""
    lines = ["| experts | type | cases | median error | largest error | where |", "|---|---|---|---|---|---|"]
    for shape, dtype in dict.fromkeys((time.case.shape, time.case.dtype) for time in times):
        part = [time for time in times if (time.case.shape, time.case.dtype) == (shape, dtype)]
        worst = max(part, key=lambda time: abs(time.error_pct))
        size = next(s for s in SHAPES if s.name == shape)
        median = float(np.median([abs(time.error_pct) for time in part]))
        lines.append(
            f"| hidden {size.hidden}, width {size.width} | {dtype} | {len(part)} "
            f"| {median:.1f} % | {abs(worst.error_pct):.1f} % "
            f"| {worst.case.slots} slots, {worst.case.tokens} tokens: {worst.measured_us:.0f} us, "
            f"model {worst.model_us:.0f} |"
        )
    return "\n".join(lines) + "\n"


def entry(times: Sequence[ExpertTime], common: dict[str, Any]) -> dict[str, Any]:
    """The largest error: three shapes, bf16 and FP8, 8 to 48 active slots, 8 to 512 tokens a GPU."""
    error = round(largest(times), 2)
    return {
        "name": "simulate.decode.expert_time_error_pct.max", "value": error, "lower": error, "upper": error,
        "unit": "%", "kind": "simulated", **common,
        "hardware": "time model against DeepGEMM on 1 x H200, experts of three shapes, on the points fitted",
    }  # fmt: skip
