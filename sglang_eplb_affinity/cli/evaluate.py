"""``evaluate``: maps x traces x dispatch rules."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from sglang_eplb_affinity.cli.options import FILE, check_output, dense_layers_option, say, topology_of, topology_options
from sglang_eplb_affinity.cli.progress import progress
from sglang_eplb_affinity.dispatch.evaluate import (
    DEFINITIONS,
    METRICS,
    SOURCE_MODEL,
    even_load,
    measure_trace,
    moved_experts,
)
from sglang_eplb_affinity.dispatch.losses import Loss, without_gpus
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.dumps import read_dumps
from sglang_eplb_affinity.formats.maps import load_map

LOSS_METRICS = tuple(Loss.__dataclass_fields__)


@click.command("evaluate")
@click.option("--trace", "traces", type=FILE, multiple=True, help="Routing trace (.npz); may repeat.")
@click.option(
    "--dump", "dumps", type=FILE, multiple=True, help="SGLang recorder dump with token sets (.pt); may repeat."
)
@click.option("--map", "maps", type=FILE, multiple=True, required=True, help="Expert map; may repeat.")
@topology_options
@click.option(
    "--dispatch", "rules", type=click.Choice(DISPATCH_RULES), multiple=True, default=("cover",), show_default=True,
    help="Replica choice; may repeat. dynamic spreads evenly over replicas, as EPLB assumes.",
)  # fmt: skip
@click.option(
    "--pass-tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Tokens of one GPU in one pass: what pass_load_max_over_mean is of, and what cover_balanced sees.",
)
@click.option("--without-rank", "ranks", type=int, multiple=True, help="As if this GPU were lost; may repeat.")
@click.option("--without-node", "lost_nodes", type=int, multiple=True, help="As if this node were lost; may repeat.")
@click.option("--current-map", type=FILE, help="Count the experts that each map moves from this one.")
@dense_layers_option
@click.option("--format", "style", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("--out", type=FILE, help="Write to a file instead of standard output.")
def evaluate_command(
    traces: tuple[Path, ...], dumps: tuple[Path, ...], maps: tuple[Path, ...], gpus: int, nodes: int,
    rules: tuple[DispatchRule, ...], pass_tokens: int, ranks: tuple[int, ...], lost_nodes: tuple[int, ...],
    current_map: Path | None, dense_layers: int, style: str, out: Path | None,
) -> None:  # fmt: skip
    """Fan-outs, remote copies and GPU load of maps on recorded tokens.

    \b
    Example:
      python -m sglang_eplb_affinity evaluate --trace test.npz --map eplb.json --map affinity.json \\
          --gpus 8 --nodes 2 --dispatch cover --dispatch dynamic --format json
    """
    topology = topology_of(gpus, nodes)
    if not traces and not dumps:
        raise InputError("give --trace or --dump, once or several times")
    if out is not None:
        check_output(out)
    gone = _lost_gpus(ranks, lost_nodes, topology)
    results: list[dict[str, Any]] = []
    recordings = [*map(_of_trace, traces), *(_of_dumps([path]) for path in dumps)]
    if len(dumps) > 1:
        recordings.append(_of_dumps(dumps))
    total = len(recordings) * len(maps) * len(rules)
    with progress(total, "evaluating", show=total > 1) as done:
        for recorded in recordings:
            experts, current = recorded.num_experts, None
            if current_map is not None:
                read = load_map(current_map, dense_layers, experts, gpus)
                current = recorded.restrict(read, dense_layers, str(current_map))
            for map_path in maps:
                expert_map = load_map(map_path, dense_layers, experts, gpus)
                expert_map = recorded.restrict(expert_map, dense_layers, str(map_path))
                for rule in rules:
                    results.append(_result(recorded, map_path, expert_map, topology, rule, current, gone, pass_tokens))
                    done(1)
    text = {"json": _json, "csv": _csv, "table": _table}[style](results, topology)
    if out is None:
        click.echo(text)
    else:
        write_atomically(out, (text + "\n").encode())


@dataclass(frozen=True)
class _Recorded:
    """What to evaluate on: ``trace``, or ``counts`` int64 [layers, experts] where token sets were not recorded.

    ``layers``: those of the recording that have tokens (a dump has dense layers too); None: all ``num_layers``.
    """

    path: str
    num_experts: int
    num_layers: int
    trace: RoutingTrace | None = None
    counts: np.ndarray | None = None
    layers: np.ndarray | None = None

    def restrict(self, expert_map: ExpertMap, dense_layers: int, source: str) -> ExpertMap:
        """The rows of the layers that have tokens."""
        fitting = expert_map.aligned(self.num_layers, dense_layers, source, self.path)
        if self.layers is None:
            return fitting
        return ExpertMap(fitting.physical_to_logical[self.layers], fitting.num_experts)


def _of_trace(path: Path) -> _Recorded:
    trace = RoutingTrace.load(path)
    return _Recorded(str(path), trace.num_experts, trace.num_layers, trace)


def _of_dumps(paths: Sequence[Path]) -> _Recorded:
    """One dump, or several as one, weighed by their tokens."""
    name = str(paths[0]) if len(paths) == 1 else f"all {len(paths)} dumps"
    window = read_dumps(paths, note=say)
    layers = np.flatnonzero(window.counts.any(1))
    if not len(layers):
        raise InputError(f"{name}: empty, no tokens were recorded")
    if window.tokens is None or not (window.tokens >= 0).any():
        say(f"{name}: holds counts only: load is known, if replicas share evenly; fan-outs and copies are not")
        return _Recorded(name, window.num_experts, window.num_layers, None, window.counts[layers], layers)
    layers = np.flatnonzero((window.tokens >= 0).any((1, 2)))
    tokens = window.tokens[layers].transpose(1, 0, 2)
    whole = tokens[(tokens >= 0).all((1, 2))]
    if not len(whole):
        raise InputError(f"{name}: no token was recorded in all of its layers")
    trace = RoutingTrace(whole, window.num_experts, source=name)
    return _Recorded(name, window.num_experts, window.num_layers, trace, None, layers)


def _load_result(
    recorded: _Recorded, map_path: Path, expert_map: ExpertMap, topology: Topology, rule: DispatchRule,
    current: ExpertMap | None,
) -> dict[str, Any]:  # fmt: skip
    """What counts alone tell: the load, each expert's evenly shared by its replicas. The rest is None."""
    assert recorded.counts is not None
    load = even_load(recorded.counts, expert_map, topology)
    moved = None if current is None else moved_experts(current, expert_map, topology)
    known = load.max(1) / load.mean(1)
    return {
        "trace": recorded.path,
        "map": str(map_path),
        "dispatch": rule,
        "gpus": topology.num_gpus,
        "nodes": topology.num_nodes,
        "tokens": None,
        "layers": len(load),
        "slots": expert_map.num_slots,
        **{name: float(known.mean()) if name == "load_max_over_mean" else None for name in METRICS},
        "moved_experts": None if moved is None else int(moved.sum()),
        "per_layer": {
            **{name: known.tolist() if name == "load_max_over_mean" else None for name in METRICS},
            "gpu_load": load.tolist(),
            "moved_experts": None if moved is None else moved.tolist(),
        },
    }


def _result(
    recorded: _Recorded, map_path: Path, expert_map: ExpertMap, topology: Topology, rule: DispatchRule,
    current: ExpertMap | None, gone: list[int], pass_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    if recorded.trace is None:
        if gone:
            raise InputError(f"{recorded.path}: holds counts only; --without-rank and --without-node need token sets")
        return _load_result(recorded, map_path, expert_map, topology, rule, current)
    trace, trace_path = recorded.trace, recorded.path
    traffic = measure_trace(trace, expert_map, topology, rule, str(map_path), pass_tokens)
    moved = None if current is None else moved_experts(current, expert_map, topology)
    loss = without_gpus(trace, expert_map, topology, rule, gone, str(map_path)) if gone else None
    return {
        "trace": str(trace_path),
        "map": str(map_path),
        "dispatch": rule,
        "gpus": topology.num_gpus,
        "nodes": topology.num_nodes,
        "tokens": trace.num_tokens,
        "pass_tokens": pass_tokens,
        "layers": trace.num_layers,
        "slots": expert_map.num_slots,
        **{name: float(getattr(traffic, name).mean()) for name in METRICS},
        "moved_experts": None if moved is None else int(moved.sum()),
        **({} if loss is None else {name: float(getattr(loss, name).mean()) for name in LOSS_METRICS}),
        "per_layer": {
            **{name: getattr(traffic, name).tolist() for name in METRICS},
            "gpu_load": traffic.gpu_load.tolist(),
            "moved_experts": None if moved is None else moved.tolist(),
            **({} if loss is None else {name: getattr(loss, name).tolist() for name in LOSS_METRICS}),
        },
    }


def _lost_gpus(ranks: tuple[int, ...], nodes: tuple[int, ...], topology: Topology) -> list[int]:
    for flag, values, count in (
        ("--without-rank", ranks, topology.num_gpus), ("--without-node", nodes, topology.num_nodes)
    ):  # fmt: skip
        for value in values:
            if not 0 <= value < count:
                raise InputError(f"{flag} {value}: must be 0 to {count - 1}")
    gone = {*ranks, *(g for g in range(topology.num_gpus) if g // topology.gpus_per_node in nodes)}
    if len(gone) == topology.num_gpus:
        raise InputError("--without-rank, --without-node: no GPU would be left")
    return sorted(gone)


def _json(results: list[dict[str, Any]], topology: Topology) -> str:
    head: dict[str, Any] = {"version": 1, "source_model": SOURCE_MODEL, "definitions": DEFINITIONS}
    if len(results) == 1:  # one map, trace and rule: its means at the top too, for short scripts
        head.update({key: value for key, value in results[0].items() if key != "per_layer"})
    return json.dumps({**head, "results": results}, indent=1)


def _rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key != "per_layer"} for result in results]


def _csv(results: list[dict[str, Any]], topology: Topology) -> str:
    buffer = io.StringIO()
    rows = _rows(results)
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().rstrip()


def _table(results: list[dict[str, Any]], topology: Topology) -> str:
    lost = [name for name in LOSS_METRICS if name in results[0]]
    names = [*METRICS, *lost, *(["moved_experts"] if results[0]["moved_experts"] is not None else [])]
    header = ["trace", "map", "dispatch", *names]
    lines = [header]
    for result in results:
        values = [_cell(name, result[name]) for name in names]
        lines.append([Path(result["trace"]).name, Path(result["map"]).name, result["dispatch"], *values])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    title = f"{topology.num_gpus} GPUs on {topology.num_nodes} nodes; means over layers. Source: {SOURCE_MODEL}."
    return "\n".join([title, *rows])


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "unknown"
    return str(value) if name == "moved_experts" else f"{value:.4f}"
