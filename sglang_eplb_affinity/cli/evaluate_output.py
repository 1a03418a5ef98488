"""Results of ``evaluate`` as JSON, CSV and a table."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from sglang_eplb_affinity.dispatch.evaluate import DEFINITIONS, METRICS, SOURCE_MODEL
from sglang_eplb_affinity.dispatch.losses import Loss
from sglang_eplb_affinity.domain.topology import Topology

LOSS_METRICS = tuple(Loss.__dataclass_fields__)


def as_json(results: list[dict[str, Any]], topology: Topology) -> str:
    head: dict[str, Any] = {"version": 1, "source_model": SOURCE_MODEL, "definitions": DEFINITIONS}
    if len(results) == 1:  # one map, trace and rule: its means at the top too, for short scripts
        head.update({key: value for key, value in results[0].items() if key != "per_layer"})
    return json.dumps({**head, "results": results}, indent=1)


def _rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key != "per_layer"} for result in results]


def as_csv(results: list[dict[str, Any]], topology: Topology) -> str:
    buffer = io.StringIO()
    rows = _rows(results)
    columns = dict.fromkeys(name for row in rows for name in row)  # of counts alone less is known
    writer = csv.DictWriter(buffer, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().rstrip()


def as_table(results: list[dict[str, Any]], topology: Topology) -> str:
    lost = [name for name in LOSS_METRICS if name in results[0]]
    names = [*METRICS, *lost, *(["moved_experts"] if results[0]["moved_experts"] is not None else [])]
    header = ["trace", "map", "dispatch", *names]
    lines = [header]
    for result in results:
        values = [_cell(name, result[name]) for name in names]
        further = result.get("further_slots")
        rule = f"{result['dispatch']}+{further}" if further else result["dispatch"]
        lines.append([Path(result["trace"]).name, Path(result["map"]).name, rule, *values])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    title = f"{topology.num_gpus} GPUs on {topology.num_nodes} nodes; means over layers. Source: {SOURCE_MODEL}."
    return "\n".join([title, *rows])


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "unknown"
    return str(value) if name == "moved_experts" else f"{value:.4f}"
