"""Memory as a budget: what each number of redundant experts gains, and the KV cache that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.planner.redundancy import knee, redundancies_within, slots_within
from sglang_eplb_affinity.simulate.scenario import Interval
from sglang_eplb_affinity.simulate.system import System

if TYPE_CHECKING:
    from sglang_eplb_affinity.simulate.recommend import Candidate

# GB (1e9 bytes) of a GPU's memory, as sold.
GPU_MEMORY_GB = {"H100": 80.0, "H800": 80.0, "H200": 141.0, "B200": 180.0, "GB200": 186.0}
USED_SHARE = 0.9  # of the memory; the rest is for activations, communication buffers and graphs


@dataclass(frozen=True)
class MemoryRow:
    """Affinity at one number of redundant experts. Gains: shorter steps in %; ``kv_tokens`` given up on each GPU."""

    redundant: int
    expert_gb: float
    kv_tokens: int
    over_eplb_same: Interval
    over_eplb_best: Interval
    step_ms: float
    gpu_fanout: float
    node_fanout: float
    load: float
    knee: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def expert_gb(system: System, redundant: int) -> float:
    """GB of expert weights on each GPU."""
    slots = (system.model.experts + redundant) / system.cluster.gpus
    return slots * system.model.moe_layers * system.model.expert_bytes / 1e9


def free_for_experts_gb(system: System) -> float:
    """What other weights and the KV cache of the running requests leave of a GPU's memory, by the topology."""
    gpu, model = system.gpu.name, system.model
    known = next((gb for name, gb in GPU_MEMORY_GB.items() if gpu.upper().startswith(name)), None)
    if known is None:
        raise InputError(f"--memory-gb auto: GPU {gpu!r} is not one of {', '.join(GPU_MEMORY_GB)}; give GB")
    attention = model.layers * model.attention_mparams * 1e6 * model.attention_bytes_per_weight
    dense = 3 * model.hidden * (model.dense_layers * model.dense_intermediate) * model.expert_bytes_per_weight
    shared = model.moe_layers * model.shared_experts * model.expert_bytes
    cache = system.serving.decode_batch_per_gpu * system.serving.context_tokens * kv_bytes(system)
    return known * USED_SHARE - (attention + dense + shared + cache) / 1e9


def kv_bytes(system: System) -> float:
    """KV cache of one token in all layers."""
    return system.model.kv_bytes_per_token * system.model.layers


def redundancies(system: System, memory_gb: float) -> list[int]:
    """Redundant experts to try within ``memory_gb`` for experts on each GPU."""
    model, gpus = system.model, system.cluster.gpus
    slots = slots_within(memory_gb * 1e9, model.expert_bytes, model.moe_layers)
    try:
        return redundancies_within(model.experts, gpus, slots)
    except InputError as error:
        raise InputError(f"--memory-gb {memory_gb:g}: {error}") from None


def memory_rows(system: System, candidates: Sequence[Candidate]) -> list[MemoryRow]:
    """Rows by rising redundancy, from affinity and EPLB candidates of one phase (each at its best DeepEP mode)."""
    from sglang_eplb_affinity.simulate.recommend import gain

    def best(algorithm: str, redundant: int | None) -> Candidate:
        fitting = [
            c for c in candidates
            if c.result.algorithm == algorithm and (redundant is None or c.result.redundant == redundant)
        ]  # fmt: skip
        return min(fitting, key=lambda c: float(c.step_ms().mean()))

    numbers = sorted({c.result.redundant for c in candidates})
    at_best = best("eplb", None)
    least = expert_gb(system, numbers[0])
    rows = []
    for redundant in numbers:
        affinity, same = best("affinity", redundant), best("eplb", redundant)
        gb, r = expert_gb(system, redundant), affinity.result
        rows.append(
            MemoryRow(
                redundant, gb, round((gb - least) * 1e9 / kv_bytes(system)), gain(affinity, same),
                gain(affinity, at_best), float(affinity.step_ms().mean()), r.gpu_fanout, r.node_fanout,
                r.load_max_over_mean,
            )
        )  # fmt: skip
    at = knee([row.expert_gb for row in rows], [row.over_eplb_best.value for row in rows])
    return [MemoryRow(**{**row.__dict__, "knee": i == at}) for i, row in enumerate(rows)]


def memory_table(rows: Sequence[MemoryRow]) -> str:
    """Aligned text, the knee marked."""
    head = [
        "redundant",
        "GB a GPU",
        "KV tokens less",
        "over EPLB same",
        "over EPLB best",
        "GPU fan-out",
        "nodes",
        "load",
    ]
    lines = [head]
    for row in rows:
        lines.append(
            [
                f"{row.redundant}", f"{row.expert_gb:.1f}", f"{row.kv_tokens}", f"{row.over_eplb_same.value:+.1f} %",
                f"{row.over_eplb_best.value:+.1f} %", f"{row.gpu_fanout:.2f}", f"{row.node_fanout:.2f}",
                f"{row.load:.3f}" + ("  <- knee" if row.knee else ""),
            ]
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    return "\n".join(
        "  " + "  ".join([*(cell.rjust(w) for cell, w in zip(line, widths, strict=False)), line[-1]]) for line in lines
    )


def plot_memory(phases: dict[str, list[MemoryRow]], title: str, path: Path) -> None:
    """Gain against memory by phase, over EPLB at the same redundancy and at its best; the knee is a star."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs the package matplotlib, which is not installed") from None
    figure = Figure(figsize=(6.5 * len(phases), 4.8), layout="constrained")
    axes = figure.subplots(1, len(phases), squeeze=False)[0]
    for axis, (phase, rows) in zip(axes, phases.items(), strict=True):
        x = np.array([row.expert_gb for row in rows])
        for name, label in (("over_eplb_best", "over EPLB at its best"), ("over_eplb_same", "over EPLB, as many")):
            axis.plot(x, [getattr(row, name).value for row in rows], marker="o", label=label)
        chosen = next(row for row in rows if row.knee)
        axis.plot(chosen.expert_gb, chosen.over_eplb_best.value, marker="*", markersize=16, color="black", label="knee")
        for row in rows:
            axis.annotate(f"+{row.redundant}", (row.expert_gb, row.over_eplb_best.value), xytext=(0, 6),
                          textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
        axis.set(xlabel="GB of experts on each GPU", ylabel="shorter step in %", title=f"{phase}, simulated")
        axis.legend()
    figure.suptitle(title)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
