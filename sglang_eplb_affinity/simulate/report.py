"""Results as a table, as JSON and as plots. Everything here is simulated, and says so."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_eplb_affinity import __version__
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.simulate.scenario import Algorithm, Interval, PhaseResult, baseline_of, gain_pct
from sglang_eplb_affinity.simulate.system import System

ASSUMED_ERROR_NOTE = (
    "intervals: 90 % of resampled batches; the time model's own error is up to 15 % on dispatch and combine "
    "(docs/capacity_planning.md), but most of it cancels in a gain"
)


def header(system: System, routing: str, command: str) -> dict[str, Any]:
    return {
        "version": 1,
        "kind": "simulated",
        "system": system.name,
        "description": system.description,
        "routing": routing,
        "calibration": system.cluster.calibration,
        "overlap": system.serving.overlap,
        "note": ASSUMED_ERROR_NOTE,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "software": f"sglang_eplb_affinity {__version__}",
        "command": command,
    }


def to_json(head: dict[str, Any], results: Sequence[PhaseResult], prompt_tokens: int) -> dict[str, Any]:
    """All results, with gains against both baselines, and TTFT or TPOT."""
    out = []
    for result in results:
        entry = dataclasses.asdict(result)
        entry["latency_ms"] = dataclasses.asdict(latency(result, prompt_tokens))
        entry["latency_name"] = "TTFT" if result.phase == "prefill" else "TPOT"
        entry["tokens_per_second_per_gpu"] = result.tokens_per_second_per_gpu
        for name in _BASELINES:
            other = baseline_of(results, result, name)
            if other is not None and other is not result:
                entry[f"gain_pct_over_{name}"] = dataclasses.asdict(gain_pct(result, other))
        out.append(entry)
    return {**head, "results": out}


def latency(result: PhaseResult, prompt_tokens: int) -> Interval:
    """TPOT is a decode step; TTFT the prefill steps that one prompt needs, without queueing."""
    steps = 1 if result.phase == "decode" else -(-prompt_tokens // result.tokens_per_gpu)
    step = result.step_ms
    return Interval(step.value * steps, step.lower * steps, step.upper * steps)


_BASELINES: tuple[Algorithm, ...] = ("none", "eplb")
COLUMNS = (
    "GPUs", "phase", "tokens/GPU", "algorithm", "dispatch us", "experts us", "combine us", "rest us", "step ms",
    "TTFT/TPOT ms", "tokens/s/GPU", "gain over EPLB %", "GPU fan-out", "node fan-out", "load", "active slots",
    "slowest in dispatch",
)  # fmt: skip


def rows(results: Sequence[PhaseResult], prompt_tokens: int) -> list[list[str]]:
    out = []
    for r in results:
        baseline = baseline_of(results, r, "eplb")
        gain = "" if baseline is None or baseline is r else _signed(gain_pct(r, baseline))
        out.append([
            str(r.gpus), f"{r.phase} ({r.mode})", str(r.tokens_per_gpu),
            f"{r.algorithm} +{r.redundant} {r.rule_text}",
            *(f"{getattr(r, f'{name}_us').value:.0f}" for name in ("dispatch", "experts", "combine", "rest")),
            f"{r.step_ms.value:.1f} [{r.step_ms.lower:.1f}, {r.step_ms.upper:.1f}]",
            f"{latency(r, prompt_tokens).value:.1f}", f"{r.tokens_per_second_per_gpu:.0f}", gain,
            f"{r.gpu_fanout:.2f}", f"{r.node_fanout:.2f}", f"{r.load_max_over_mean:.2f}", f"{r.active_slots:.1f}",
            r.slowest["dispatch"],
        ])  # fmt: skip
    return out


def _signed(interval: Interval) -> str:
    return f"{interval.value:+.1f} [{interval.lower:+.1f}, {interval.upper:+.1f}]"


def text_table(head: dict[str, Any], results: Sequence[PhaseResult], prompt_tokens: int) -> str:
    lines = [list(COLUMNS), *rows(results, prompt_tokens)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    title = f"SIMULATED. {head['system']}: {head['description']}. Routing: {head['routing']}. Layer means."
    return "\n".join([title, *body, head["note"]])


def markdown_table(results: Sequence[PhaseResult], prompt_tokens: int) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows(results, prompt_tokens)])


def plot(results: Sequence[PhaseResult], head: dict[str, Any], folder: Path) -> list[Path]:
    """One picture a phase: stacked stages of a layer for each algorithm, and step time with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not folder.is_dir():
        raise InputError(f"{folder}: the folder for plots does not exist")
    written = []
    stages = ("dispatch", "experts", "combine", "rest")
    for phase in dict.fromkeys(r.phase for r in results):
        part = [r for r in results if r.phase == phase]
        labels = [f"{r.gpus} GPUs\n{r.tokens_per_gpu} tok\n{r.algorithm}" for r in part]
        figure, (left, right) = plt.subplots(2, 1, figsize=(max(7.0, 0.62 * len(part)), 8), sharex=True)
        bottom = [0.0] * len(part)
        for stage in stages:
            values = [getattr(r, f"{stage}_us").value for r in part]
            left.bar(labels, values, bottom=bottom, label=stage)
            bottom = [b + v for b, v in zip(bottom, values, strict=True)]
        left.set_ylabel("us per layer")
        left.set_title(f"{head['system']}, {phase}: simulated\n{head['routing']}", fontsize=9)
        left.legend(ncol=4, loc="upper center", fontsize=8)
        left.set_ylim(top=1.15 * max(bottom))
        middle = [r.step_ms.value for r in part]
        below = [r.step_ms.value - r.step_ms.lower for r in part]
        above = [r.step_ms.upper - r.step_ms.value for r in part]
        right.errorbar(labels, middle, yerr=[below, above], fmt="o")
        right.set_ylabel("step ms (90 % of batches)")
        right.set_ylim(0, 1.1 * max(m + a for m, a in zip(middle, above, strict=True)))
        right.tick_params(axis="x", labelsize=7)
        figure.tight_layout()
        path = folder / f"simulate-{head['system']}-{phase}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
    return written
