"""Points from a result file of `python -m bench.micro.deepep` (times over fan-out and message size on one host)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.calibration.published import Point
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.simulate.calibration import LinkBytes

# Points of this hidden size, and those with a fractional fan-out, are never fitted: they check; of DeepEP V2 those of
# one routing more.
HELD_OUT_HIDDEN = 4096
HELD_OUT_V2 = ("1.5", "remote")


def load_measured(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{path}: not JSON") from None
    if not isinstance(data, dict) or not isinstance(data.get("sections"), dict):
        raise InputError(f"{path}: not a result of `python -m bench.micro.deepep` (it has no sections)")
    return data


def engine_us(measured: Sequence[dict[str, Any]]) -> float:
    """Median of what normal mode's dispatch costs an engine beyond its kernel (layout, wait on the CPU)."""
    rows = [
        row for data in measured for row in data["sections"].get("normal", {}).get("rows", []) if "error" not in row
    ]
    extra = [row["full_dispatch_us"]["median"] - row["dispatch_us"]["median"] for row in rows]
    return max(0.0, float(np.median(extra))) if extra else 0.0


def v2_engine_us(measured: Sequence[dict[str, Any]]) -> float:
    """Median of what DeepEP V2's eager dispatch takes beyond that in a graph: launches and its wait on the CPU."""
    rows = [row for data in measured for row in data["sections"].get("v2", {}).get("rows", []) if "error" not in row]
    where = ("hidden", "dtype", "tokens", "routing")
    graph = {tuple(row[k] for k in where): row for row in rows if row["mode"] == "v2_graph"}
    extra = [
        row["dispatch_us"]["median"] - graph[at]["dispatch_us"]["median"]
        for row in rows
        if row["mode"] == "v2_eager" and (at := tuple(row[k] for k in where)) in graph
    ]
    return max(0.0, float(np.median(extra))) if extra else 0.0


def measured_points(data: dict[str, Any], key: str, local_share: float, channel_local_share: float) -> Iterator[Point]:
    """Points `h200-xGPUS` of one "mode.phase", with link bytes for these shares (see PhaseConstants)."""
    source = f"{data.get('command')} on {data.get('hardware')}, {data.get('date')}"
    mode, phase = key.split(".")
    gpus = data["settings"]["gpus"]
    calibration = f"h200-x{gpus}"
    for row in data["sections"].get(mode, {}).get("rows", []):
        if "error" in row or row["mode"] == "v2_eager":
            continue
        size = row[f"{phase}_bytes"]
        prefix = "expert_copies" if mode == "low_latency" else "copies"
        away, stay = row[f"{prefix}_remote"], local_share * row[f"{prefix}_local"]
        copies = away + stay
        tokens = row["tokens"]
        # All GPUs route alike, so this is what one that is the busiest destination of all would receive.
        received = tokens * gpus * max(channel_local_share * row[f"{prefix}_local"], away / (gpus - 1))
        wire = tokens * away * size if mode != "low_latency" else 0.0
        # Of all its experts where a token visits one GPU; at 1.5 half of the tokens do.
        most_rows = data["settings"]["top_k"] / math.floor(row["fanout"])
        load = LinkBytes(
            tokens * copies * size, 0.0, tokens * size, gpus - 1, tokens, tokens * copies, wire, received, most_rows
        )
        label = f"{row['tokens']} tokens, hidden {row['hidden']}, {row['dtype']}, {row['routing']}"
        held_out = HELD_OUT_V2 if mode == "v2" else ("1.5",)
        fit = row["hidden"] != HELD_OUT_HIDDEN and row["routing"] not in held_out
        yield Point(calibration, key, label, row[f"{phase}_us"]["median"], load, fit, source)
