"""``evaluate``: maps x traces x dispatch rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sglang_eplb_affinity.cli.evaluate_output import LOSS_METRICS, as_csv, as_json, as_table
from sglang_eplb_affinity.cli.options import FILE, check_output, dense_layers_option, topology_of, topology_options
from sglang_eplb_affinity.cli.plan_flags import check_further_slots
from sglang_eplb_affinity.cli.progress import progress
from sglang_eplb_affinity.cli.recorded import Recorded, of_dumps, of_trace
from sglang_eplb_affinity.dispatch.evaluate import (
    METRICS,
    even_load,
    measure_trace,
    moved_experts,
)
from sglang_eplb_affinity.dispatch.losses import without_gpus
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.reading import name_of
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.maps import load_map


@click.command("evaluate")
@click.option("--trace", "traces", type=FILE, multiple=True, help="Routing trace (.npz); may repeat.")
@click.option(
    "--dump", "dumps", type=FILE, multiple=True, help="SGLang recorder dump with token sets (.pt); may repeat."
)
@click.option("--map", "maps", type=FILE, multiple=True, required=True, help="Expert map; may repeat.")
@topology_options
@click.option(
    "--dispatch", "rules", type=click.Choice(DISPATCH_RULES), multiple=True, default=("cover_balanced",),
    show_default=True, help="Replica choice; may repeat. dynamic spreads evenly over replicas, as EPLB assumes.",
)  # fmt: skip
@click.option(
    "--further-slots", type=click.IntRange(0), default=0, show_default=True,
    help="Slots of each GPU that small passes use besides the primary ones; needs --dispatch primary.",
)  # fmt: skip
@click.option(
    "--pass-tokens",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Tokens of one GPU in one pass: what the pass_ metrics are of, and what cover_balanced sees.",
)
@click.option("--without-rank", "ranks", type=int, multiple=True, help="As if this GPU were lost; may repeat.")
@click.option("--without-node", "lost_nodes", type=int, multiple=True, help="As if this node were lost; may repeat.")
@click.option("--current-map", type=FILE, help="Count the experts that each map moves from this one.")
@dense_layers_option
@click.option("--format", "style", type=click.Choice(["table", "json", "csv"]), default="table", show_default=True)
@click.option("--out", type=FILE, help="Write to a file instead of standard output.")
def evaluate_command(
    traces: tuple[Path, ...], dumps: tuple[Path, ...], maps: tuple[Path, ...], gpus: int, nodes: int,
    rules: tuple[DispatchRule, ...], further_slots: int, pass_tokens: int, ranks: tuple[int, ...],
    lost_nodes: tuple[int, ...], current_map: Path | None, dense_layers: int, style: str, out: Path | None,
) -> None:  # fmt: skip
    """Fan-outs, remote copies and GPU load of maps on recorded tokens.

    \b
    Example:
      python -m sglang_eplb_affinity evaluate --trace test.npz --map eplb.json --map affinity.json \\
          --gpus 8 --nodes 2 --dispatch cover --dispatch dynamic --format json
    """
    topology = topology_of(gpus, nodes)
    if further_slots and "primary" not in rules:
        raise InputError(f"--further-slots {further_slots}: needs --dispatch primary")
    if not traces and not dumps:
        raise InputError("give --trace or --dump, once or several times")
    if out is not None:
        check_output(out)
    gone = _lost_gpus(ranks, lost_nodes, topology)
    results: list[dict[str, Any]] = []
    recordings = [*map(of_trace, traces), *(of_dumps([path], dense_layers) for path in dumps)]
    if len(dumps) > 1:
        recordings.append(of_dumps(dumps, dense_layers))
    total = len(recordings) * len(maps) * len(rules)
    with progress(total, "evaluating", show=total > 1) as done:
        for recorded in recordings:
            experts, current = recorded.num_experts, None
            if current_map is not None:
                read = load_map(current_map, dense_layers, experts, gpus)
                current = recorded.restrict(read, dense_layers, name_of(current_map))
            for map_path in maps:
                expert_map = load_map(map_path, dense_layers, experts, gpus)
                expert_map = recorded.restrict(expert_map, dense_layers, name_of(map_path))
                check_further_slots(further_slots, expert_map.num_slots - experts, gpus)
                for rule in rules:
                    results.append(
                        _result(
                            recorded, map_path, expert_map, topology, rule, current, gone, pass_tokens, further_slots
                        )
                    )
                    done(1)
    text = {"json": as_json, "csv": as_csv, "table": as_table}[style](results, topology)
    if out is None:
        click.echo(text)
    else:
        write_atomically(out, (text + "\n").encode())


def _load_result(
    recorded: Recorded, map_path: Path, expert_map: ExpertMap, topology: Topology, rule: DispatchRule,
    current: ExpertMap | None,
) -> dict[str, Any]:  # fmt: skip
    """What counts alone tell: the load, each expert's evenly shared by its replicas. The rest is None."""
    assert recorded.counts is not None
    load = even_load(recorded.counts, expert_map, topology)
    moved = None if current is None else moved_experts(current, expert_map, topology)
    known = load.max(1) / load.mean(1)
    return {
        "trace": recorded.path,
        "map": name_of(map_path),
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
    recorded: Recorded, map_path: Path, expert_map: ExpertMap, topology: Topology, rule: DispatchRule,
    current: ExpertMap | None, gone: list[int], pass_tokens: int, further_slots: int,
) -> dict[str, Any]:  # fmt: skip
    if recorded.trace is None:
        if gone:
            raise InputError(f"{recorded.path}: holds counts only; --without-rank and --without-node need token sets")
        return _load_result(recorded, map_path, expert_map, topology, rule, current)
    trace, trace_path = recorded.trace, recorded.path
    further = further_slots if rule == "primary" else 0
    traffic = measure_trace(trace, expert_map, topology, rule, name_of(map_path), pass_tokens, further)
    moved = None if current is None else moved_experts(current, expert_map, topology)
    loss = None
    if gone:
        loss = without_gpus(trace, expert_map, topology, rule, gone, name_of(map_path), pass_tokens, further)
    return {
        "trace": str(trace_path),
        "map": name_of(map_path),
        "dispatch": rule,
        "gpus": topology.num_gpus,
        "nodes": topology.num_nodes,
        "tokens": trace.num_tokens,
        "pass_tokens": pass_tokens,
        "further_slots": further,
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
