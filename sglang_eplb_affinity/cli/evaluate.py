"""``evaluate``: maps x traces x dispatch rules."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from sglang_eplb_affinity.cli.options import FILE, check_output, topology_of, topology_options
from sglang_eplb_affinity.dispatch.evaluate import DEFINITIONS, METRICS, SOURCE_MODEL, measure_trace, moved_experts
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
@click.option("--format", "style", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("--out", type=FILE, help="Write to a file instead of standard output.")
def evaluate_command(
    traces: tuple[Path, ...], dumps: tuple[Path, ...], maps: tuple[Path, ...], gpus: int, nodes: int,
    rules: tuple[DispatchRule, ...], pass_tokens: int, ranks: tuple[int, ...], lost_nodes: tuple[int, ...],
    current_map: Path | None, style: str, out: Path | None,
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
    total = (len(traces) + len(dumps)) * len(maps) * len(rules)
    with tqdm(total=total, desc="evaluating", unit="map", leave=False, disable=True if total < 2 else None) as bar:
        for recorded in [*map(_of_trace, traces), *map(_of_dump, dumps)]:
            experts = recorded.trace.num_experts
            current = None if current_map is None else recorded.restrict(load_map(current_map, num_experts=experts))
            for map_path in maps:
                expert_map = recorded.restrict(load_map(map_path, num_experts=experts), str(map_path))
                for rule in rules:
                    results.append(_result(recorded, map_path, expert_map, topology, rule, current, gone, pass_tokens))
                    bar.update()
    text = {"json": _json, "csv": _csv, "table": _table}[style](results, topology)
    if out is None:
        click.echo(text)
    else:
        write_atomically(out, (text + "\n").encode())


@dataclass(frozen=True)
class _Recorded:
    """What to evaluate on. ``layers``: those of the map that have tokens (a dump has dense layers too); None: all."""

    path: Path
    trace: RoutingTrace
    layers: np.ndarray | None = None
    num_layers: int = 0

    def restrict(self, expert_map: ExpertMap, source: str = "current map") -> ExpertMap:
        if self.layers is None:
            return expert_map
        if expert_map.num_layers != self.num_layers:
            raise InputError(f"{source}: has {expert_map.num_layers} layers, but {self.path} has {self.num_layers}")
        return ExpertMap(expert_map.physical_to_logical[self.layers], expert_map.num_experts)


def _of_trace(path: Path) -> _Recorded:
    return _Recorded(path, RoutingTrace.load(path))


def _of_dump(path: Path) -> _Recorded:
    window = read_dumps([path])
    if window.tokens is None or not (window.tokens >= 0).any():
        raise InputError(f"{path}: holds no token sets; record with --enable-expert-affinity-recorder (or per_token)")
    layers = np.flatnonzero((window.tokens[:, :, 0] >= 0).any(1))
    tokens = window.tokens[layers].transpose(1, 0, 2)
    whole = tokens[(tokens[:, :, 0] >= 0).all(1)]
    return _Recorded(path, RoutingTrace(whole, window.num_experts, source=str(path)), layers, window.num_layers)


def _result(
    recorded: _Recorded, map_path: Path, expert_map: ExpertMap, topology: Topology, rule: DispatchRule,
    current: ExpertMap | None, gone: list[int], pass_tokens: int,
) -> dict[str, Any]:  # fmt: skip
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
        values = [f"{result[name]:.4f}" if name != "moved_experts" else str(result[name]) for name in names]
        lines.append([Path(result["trace"]).name, Path(result["map"]).name, result["dispatch"], *values])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    title = f"{topology.num_gpus} GPUs on {topology.num_nodes} nodes; means over layers. Source: {SOURCE_MODEL}."
    return "\n".join([title, *rows])
