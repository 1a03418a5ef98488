"""What the overhead comparison's cells say (see overhead.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.figures.stats import Ratio, ratio_by_block
from bench.gpu.flags import ranks_of
from bench.gpu.resident import Load, by_block
from bench.publish.summary import of_ranks

REHEARSAL = "cpu"  # the group whose figures mean nothing
# Of the whole load, and of its passes alone (server_log.pass_rates): the figure of the results, and its metric.
LOSSES = {
    "throughput_loss_pct": "total_throughput",
    "decode_loss_pct": "decode_throughput",
    "prefill_loss_pct": "prefill_throughput",
}
# Those that become entries of the summary, and what their unit says after "% of tokens/s without EPLB".
HEADLINES = {"throughput_loss_pct": "", "decode_loss_pct": ", in decode passes"}
LATENCIES = ("mean_ttft_ms", "median_ttft_ms", "p95_ttft_ms", "mean_tpot_ms", "median_tpot_ms")


def values_of(
    rows: Sequence[Mapping[str, Any]], load: Load, arms: Sequence[str], before: Mapping[str, Any]
) -> dict[str, dict[str, dict[int, float]]]:
    """Each arm's metrics by block, those of earlier sittings first; without streams there are no latencies."""
    metrics = (*LOSSES.values(), *(LATENCIES if load.streams else ()))

    def known(arm: str, metric: str) -> dict[int, float]:
        found = before.get("values", {}).get(load.name, {}).get(arm, {}).get(metric, {})
        return {int(block): value for block, value in found.items()}

    return {arm: {m: {**known(arm, m), **by_block(rows, arm, load.name, m)} for m in metrics} for arm in arms}


def unfinished(rows: Sequence[Mapping[str, Any]], loads: Mapping[Load, Sequence[str]], blocks: range) -> list[str]:
    """Which arms did not get through all their blocks in the time given."""
    done = {(row["arm"], row["load"], row["block"]) for row in rows}
    found = []
    for load, arms in loads.items():
        for arm in arms:
            missing = sum((arm, load.name, block) not in done for block in blocks)
            if missing:
                found.append(f"{arm}, {load.name}: {missing} of {len(blocks)} blocks not done in the time given")
    return found


Values = Mapping[str, Mapping[str, Mapping[Any, float]]]


def compare(values: Values, arm: str, base: str, metric: str) -> Ratio | None:
    """arm / base by block; None where no block has both."""
    a, b = ({int(k): v for k, v in values.get(name, {}).get(metric, {}).items()} for name in (arm, base))
    return ratio_by_block(a, b) if set(a) & set(b) else None


def losses(values: Values, mode: str, metric: str = "total_throughput") -> dict[str, dict[str, Any]]:
    """Percent of a throughput that each EPLB costs against none: value, lower and upper."""
    found = {eplb: compare(values, f"{eplb}-{mode}", f"none-{mode}", metric) for eplb in ("upstream", "ours")}
    return {eplb: ratio.loss_pct() for eplb, ratio in found.items() if ratio is not None}


def finish(result: dict[str, Any]) -> dict[str, Any]:
    """The comparisons of one group, from its values."""
    values = result["values"]
    for loss, metric in LOSSES.items():
        result[loss] = {mode: losses(values[mode], mode, metric) for mode in values if mode != "latency"}
    if "latency" in values:
        result["ratios"] = {
            f"auto / {base}": {
                metric: ratio.as_dict(5)
                for metric in LATENCIES
                if (ratio := compare(values["latency"], "ours-auto", f"ours-{base}", metric)) is not None
            }
            for base in ("normal", "low_latency")
        }
    return result


def entries(results: Sequence[Mapping[str, Any]], source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Summary entries of groups with an interval and nothing void."""
    found: list[dict[str, Any]] = []

    def add(result: Mapping[str, Any], name: str, unit: str, value: float, lower: float, upper: float) -> None:
        entry = {"name": name, "value": value, "lower": lower, "upper": upper, "unit": unit, "kind": "measured"}
        # A group that an earlier sitting left in the folder may be of another machine or commit than this run.
        entry |= {"hardware": result["hardware"], "versions": source["versions"]}
        entry |= {"commit": result["sittings"][-1]["commit"]}
        found.append({**entry, "date": result["date"], "command": "python -m bench.gpu.overhead --out FOLDER"})

    for result in results:
        if result["void"] or result["group"] == REHEARSAL:
            continue
        ep = of_ranks(ranks_of(result["flags"]))
        size = "" if result["group"].startswith("large") else f"{result['group']}."
        for figure, of_what in HEADLINES.items():
            unit = f"% of tokens/s without EPLB{of_what}"
            for mode, of_mode in result.get(figure, {}).items():
                for eplb, loss in of_mode.items():
                    if loss["blocks"] > 1:
                        name = f"{ep}overhead.{mode}.{size}{figure}" + (".upstream" if eplb == "upstream" else "")
                        add(result, name, unit, loss["value"], loss["lower"], loss["upper"])
        for base, metric, name in (
            ("low_latency", "mean_ttft_ms", "auto.ttft_ratio_to_low_latency"),
            ("normal", "mean_tpot_ms", "auto.tpot_ratio_to_normal"),
        ):
            ratio = result.get("ratios", {}).get(f"auto / {base}", {}).get(metric)
            if ratio and ratio["blocks"] > 1:
                add(result, ep + name, f"ratio to {base} mode", ratio["ratio"], ratio["lower"], ratio["upper"])
    return found
