"""Points from a result file of `python -m bench.deepep` (times over fan-out and message size on one host)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sglang_eplb_affinity.errors import InputError
from sglang_eplb_affinity.simulate.calibration import LinkBytes
from sglang_eplb_affinity.simulate.published import Point

# Points of this hidden size, and those with a fractional fan-out, are never fitted: they check.
HELD_OUT_HIDDEN = 4096


def load_measured(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{path}: not JSON") from None
    if not isinstance(data, dict) or not isinstance(data.get("sections"), dict):
        raise InputError(f"{path}: not a result of `python -m bench.deepep` (it has no sections)")
    return data


def engine_us(data: dict[str, Any]) -> float:
    """Median of what normal mode's dispatch costs an engine beyond its kernel (layout, wait on the CPU)."""
    rows = [row for row in data["sections"].get("normal", {}).get("rows", []) if "error" not in row]
    extra = [row["full_dispatch_us"]["median"] - row["dispatch_us"]["median"] for row in rows]
    return max(0.0, float(np.median(extra))) if extra else 0.0


def measured_points(data: dict[str, Any], calibration: str, local_share: dict[str, float]) -> Iterator[Point]:
    """Points of both modes; ``local_share`` by "mode.phase" weighs copies that stay on their GPU."""
    source = f"{data.get('command')} on {data.get('hardware')}, {data.get('date')}"
    for mode in ("normal", "low_latency"):
        for row in data["sections"].get(mode, {}).get("rows", []):
            if "error" in row:
                continue
            for phase in ("dispatch", "combine"):
                size = row[f"{phase}_bytes"]
                key = f"{mode}.{phase}"
                if mode == "normal":
                    away, stay = row["copies_remote"], row["copies_local"]
                else:
                    away, stay = row["expert_copies_remote"], row["expert_copies_local"]
                load = LinkBytes(
                    nvlink=row["tokens"] * (away + local_share.get(key, 1.0) * stay) * size,
                    rdma=0.0,
                    source=row["tokens"] * size,
                    peers=data["settings"]["gpus"] - 1,
                )
                label = f"{row['tokens']} tokens, hidden {row['hidden']}, {row['dtype']}, {row['routing']}"
                fit = row["hidden"] != HELD_OUT_HIDDEN and row["routing"] != "1.5"
                yield Point(calibration, key, label, row[f"{phase}_us"]["median"], load, fit, source)
