"""Sections of table.md for a profile's further loads: full prefill passes and common decoding."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from bench.figures.compare import block_ratios
from bench.figures.stats import noise_floor_pct
from bench.harness.arms import ARMS
from bench.harness.profile import DECODE, PREFILL, REQUESTS, LoadConfig
from bench.harness.run_folder import RunPlan
from bench.publish.sections import HEADLINE, metric_table, ratio_table

# What is compared, and what is shown beside it.
COMPARED: Mapping[str, Mapping[str, str]] = {
    REQUESTS: HEADLINE,
    PREFILL: {"full_prefill_ms": "full prefill pass ms"},
    DECODE: {
        "decode_step_ms": "decode step ms",
        "p50_tpot_ms": "P50-TPOT ms",
        "p90_tpot_ms": "P90-TPOT ms",
        "p95_itl_ms": "P95-ITL ms",
        "p99_itl_ms": "P99-ITL ms",
    },
}
_SHOWN: Mapping[str, Mapping[str, str]] = {
    REQUESTS: {},
    PREFILL: {"full_prefills": "of them timed", "input_tokens_per_s": "tokens/s"},
    DECODE: {"steady_s": "steady part s", "output_tokens_per_s": "tokens/s"},
}
_TEXT = {
    REQUESTS: "Requests that come and go.",
    PREFILL: (
        "One wave of prompts with one token out, as on a prefill server. The time from one full pass of a scheduler "
        "to its next, from the server's log, median over a row."
    ),
    DECODE: (
        "One wave that decodes together, as on a decode server: from the last first token to the first completion. "
        "The step is a scheduler's own, from the server's log; TPOT and ITL are what the client saw."
    ),
}


def load_sections(frame: pd.DataFrame, plan: RunPlan, emulated: str) -> list[str]:
    """Lines for every load but the main one; ``emulated`` is a note for headings."""
    lines: list[str] = []
    for name in plan.loads:
        rows = frame[frame["load"] == name] if name and not frame.empty else frame.iloc[:0]
        if not rows.empty:
            lines += _section(name, plan.profile.loads[name], rows, plan, emulated)
    return lines


def _section(name: str, load: LoadConfig, frame: pd.DataFrame, plan: RunPlan, emulated: str) -> list[str]:
    compared = COMPARED[load.kind]
    numbers = [c for c in frame.select_dtypes("number").columns if c not in ("block", "seed", "concurrency")]
    valid = frame[frame["valid"]]
    medians = valid.groupby(["concurrency", "arm"])[numbers].median().to_dict("index")
    measured = set(zip(frame["concurrency"], frame["arm"], strict=True))
    rows = [
        (level, arm, medians.get((level, arm)))
        for level in load.concurrency
        for arm in plan.arms
        if (level, arm) in measured
    ]
    text = _TEXT[load.kind]
    if load.request_rate:
        text += f" Poisson arrivals at {load.request_rate:g} requests/s, at most so many at once."
    if load.token_streams:
        text += f" TPOT and ITL are of the {load.token_streams} requests that stream token by token."
    lines = ["", f"## Load `{name}`{emulated}", "", f"{text} {load.lengths}; median over blocks.", ""]
    lines += metric_table(rows, {**compared, **_SHOWN[load.kind]})
    if ratios := ratio_table(frame, compared):
        lines += ["", *ratios]
    if noise := block_ratios(frame, "vanilla-again", "vanilla", list(compared)):
        lines += ["", noise_line(noise)]
    return lines


def noise_line(noise: list[float]) -> str:
    return (
        f"Noise floor: two servers of the arm {ARMS['vanilla'].title} differed by up to {noise_floor_pct(noise):.2f} % "
        f"(95th percentile over {len(noise)} single ratios)."
    )
