"""Sections of table.md: the original's layout with its published figures, ratios with intervals, tails and stalls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.figures.compare import block_ratios, compare
from bench.figures.stats import noise_floor_pct
from bench.harness.arms import ARMS, VARIANTS
from bench.publish import published

HEADLINE = {"p50_ttft_ms": "P50-TTFT ms", "p90_tpot_ms": "P90-TPOT ms", "p95_itl_ms": "P95-ITL ms", "qps": "QPS"}
TAILS = {
    "p90_ttft_ms": "P90-TTFT ms",
    "p99_ttft_ms": "P99-TTFT ms",
    "p50_tpot_ms": "P50-TPOT ms",
    "p99_tpot_ms": "P99-TPOT ms",
    "p99_itl_ms": "P99-ITL ms",
    "max_itl_ms": "largest ITL ms",
    "stall_events": "stalls",
    "longest_stall_ms": "longest stall ms",
    "output_tokens_per_s": "tokens/s",
    "goodput_qps": "goodput QPS",
}
CONDITIONS = {
    "steady_s": "steady part s",
    "mean_concurrency": "in flight, client",
    "server_in_flight": "in flight, server",
    "server_queue": "waiting for room",
    "client_cores": "client's core busy",
    "client_lag_p99_ms": "client's lag P99 ms",
}
PASSES = {
    "full_prefill_ms": "full prefill pass ms",
    "full_prefills": "of them timed",
    "full_prefill_tokens": "tokens of a GPU in one",
}
Cells = Mapping[tuple[int, str], Mapping[str, Any]]


def original_layout(summary: Cells, concurrency: Sequence[int], with_published: bool) -> list[str]:
    """No EPLB/vanilla/affinity in one cell, as the change was proposed; theirs below ours, marked."""
    lines = [row(["max concurrency", "whose", *HEADLINE.values()]), row(["---:", "---"] + ["---:"] * len(HEADLINE))]
    theirs = published.FIGURES if with_published else {}
    for level in sorted({*concurrency, *theirs}):
        if level in concurrency:
            values = [
                "/".join(number(summary.get((level, arm), {}).get(metric)) or "-" for arm in published.ARMS)
                for metric in HEADLINE
            ]
            lines.append(row([str(level), "ours", *values]))
        if level in theirs:
            values = ["/".join(f"{v:.2f}" for v in theirs[level].get(metric, ())) or "-" for metric in HEADLINE]
            lines.append(row([str(level), "theirs", *values]))
    if theirs:
        lines += [
            "",
            f"theirs: published with {published.SOURCE}, on other hardware and another model, 5 requests/s, "
            "4096 tokens in, 1536 out, one run. Their figures cannot be compared with ours, only the differences "
            "between arms.",
        ]
    return lines


def ratio_table(frame: pd.DataFrame, titles: Mapping[str, str] = HEADLINE) -> list[str]:
    """Every arm against the arms without affinity, and its variants against it; empty where nothing can be compared."""
    variants = frame[frame["arm"].isin(("affinity", *VARIANTS))]
    compared = [compare(frame, baseline, list(titles)) for baseline in ("vanilla", "none", "plain")]
    compared.append(
        compare(frame[frame["arm"].isin(("vanilla-idle", "vanilla-unrecorded"))], "vanilla-idle", list(titles))
    )
    compared += [compare(variants, baseline, list(titles)) for baseline in ("affinity", "affinity-idle")]
    ratios = pd.concat([rows for rows in compared if not rows.empty] or compared[:1], ignore_index=True)
    if ratios.empty:
        return []
    header = ["concurrency", "arm", "against", *(title.removesuffix(" ms") for title in titles.values()), "blocks"]
    lines = [row(header), row(["---:", "---", "---"] + ["---:"] * (len(titles) + 1))]
    keys = ["baseline", "concurrency", "arm"]
    for (baseline, level, arm), rows in ratios.groupby(keys, sort=False):
        by_metric = {r["metric"]: r for r in rows.to_dict("records")}
        cells = [_ratio(by_metric.get(metric)) for metric in titles]
        lines.append(row([str(level), ARMS[arm].title, ARMS[baseline].title, *cells, str(rows["blocks"].max())]))
    return lines


def noise_text(frame: pd.DataFrame) -> str:
    """What two servers of one arm differ by; says so where that was not measured."""
    noise = block_ratios(frame, "vanilla-again", "vanilla", list(HEADLINE))
    if not noise:
        return "Noise floor: not measured in this run (arm `vanilla-again`)."
    return (
        f"Noise floor: two servers of the same arm differed by up to {noise_floor_pct(noise):.2f} % "
        f"(95th percentile over {len(noise)} single ratios)."
    )


def metric_table(rows: Sequence[tuple[int, str, Mapping[str, Any] | None]], titles: Mapping[str, str]) -> list[str]:
    """One line for each concurrency and arm with the metrics that were measured; VOID where no block counts."""
    known = {name for *_, values in rows if values for name in titles if not pd.isna(values.get(name))}
    columns = {name: title for name, title in titles.items() if name in known}
    lines = [row(["concurrency", "arm", *columns.values()]), row(["---:", "---"] + ["---:"] * len(columns))]
    for level, arm, values in rows:
        cells = ["VOID"] * len(columns) if values is None else [number(values.get(name)) for name in columns]
        lines.append(row([str(level), ARMS[arm].title, *cells]))
    return lines if columns else []


def _ratio(found: Mapping[str, Any] | None) -> str:
    """`0.950 [0.940, 0.961]`, in bold where Holm's p is below 0.05."""
    if found is None:
        return ""
    if pd.isna(found["lower"]):
        return f"{found['ratio']:.3f}"
    text = f"{found['ratio']:.3f} [{found['lower']:.3f}, {found['upper']:.3f}]"
    return f"**{text}**" if found["p_holm"] < 0.05 else text


def number(value: Any, digits: int = 2) -> str:
    return "" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
