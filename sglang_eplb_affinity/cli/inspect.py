"""``inspect``: what is in a map or a trace, with a plot."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from sglang_eplb_affinity.cli.options import FILE, check_output, check_png, dense_layers_option, say, topology_of
from sglang_eplb_affinity.cli.picture import picture_of
from sglang_eplb_affinity.dispatch.evaluate import even_load
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, DispatchRule
from sglang_eplb_affinity.domain.content import read_content
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.reading import name_of
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.dumps import dense_rows, read_dumps
from sglang_eplb_affinity.formats.maps import check_devices, check_slots, load_map, parse_map
from sglang_eplb_affinity.formats.recorded_map import MapOrigin, origin_of


@click.command("inspect")
@click.option("--map", "map_path", type=FILE, help="Expert map to describe; with routing: what it makes of that.")
@click.option("--trace", "trace_path", type=FILE, help="Routing trace to describe.")
@click.option("--dump", "dumps", type=FILE, multiple=True, help="SGLang recorder dump to describe; may repeat.")
@click.option("--gpus", type=int, help="GPUs: also tells what each holds, and with routing its load.")
@click.option("--nodes", type=int, default=1, show_default=True)
@click.option(
    "--dispatch", "rule", type=click.Choice(DISPATCH_RULES), default="cover_balanced", show_default=True,
    help="Replica choice of the fan-out histogram.",
)  # fmt: skip
@dense_layers_option
@click.option("--layer", type=int, help="Layer to show in detail.  [default: the most skewed]")
@click.option("--format", "style", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--plot", type=FILE, help="Write a picture (.png).")
def inspect_command(
    map_path: Path | None, trace_path: Path | None, dumps: tuple[Path, ...], gpus: int | None, nodes: int,
    rule: DispatchRule, dense_layers: int, layer: int | None, style: str, plot: Path | None,
) -> None:  # fmt: skip
    """Describe a map, a trace or dumps: load by expert and GPU, co-activation, fan-out, replicas.

    \b
    Example:
      python -m sglang_eplb_affinity inspect --trace trace.npz --plot trace.png
      python -m sglang_eplb_affinity inspect --map map.json --gpus 8 --nodes 2
      python -m sglang_eplb_affinity inspect --dump dump.pt --map map.json --gpus 8 --format json
    """
    if trace_path is not None and dumps:
        raise InputError("give --trace or --dump, not both")
    if map_path is None and trace_path is None and not dumps:
        raise InputError("give --map, --trace or --dump")
    if plot is not None:
        check_output(plot)
        check_png(plot, "--plot")
    topology = None if gpus is None else topology_of(gpus, nodes)
    if trace_path is None and not dumps:
        assert map_path is not None
        _inspect_only_map(map_path, dense_layers, topology, layer, style, plot)
        return
    trace = None if trace_path is None else RoutingTrace.load(trace_path)
    window = read_dumps(dumps, note=say) if trace is None else RoutingWindow.from_trace(trace, 2048)
    dense_rows(window, dense_layers, name_of(trace_path or dumps[0]))
    if not window.counts.any():
        raise InputError(f"{name_of(dumps[0])}: empty, no tokens were recorded")
    expert_map = None
    if map_path is not None:
        if topology is None:
            raise InputError("--map with routing needs --gpus")
        name = name_of(trace_path or dumps[0])
        expert_map = load_map(map_path, dense_layers, window.num_experts, gpus)
        expert_map = expert_map.aligned(window.num_layers, dense_layers, name_of(map_path), name)
    elif topology is not None:
        slots = -(-window.num_experts // topology.num_gpus) * topology.num_gpus
        say(f"no --map: GPUs hold SGLang's start placement, {slots} slots")
        expert_map = ExpertMap.contiguous(window.num_layers, window.num_experts, slots)
    _inspect_routing(window, trace, expert_map, topology, rule, layer, style, plot)


def _inspect_only_map(
    map_path: Path, dense_layers: int, topology: Topology | None, layer: int | None, style: str, plot: Path | None
) -> None:
    data = read_content(map_path)
    if topology is not None:
        check_devices(data, topology.num_gpus, name_of(map_path))
    expert_map = parse_map(data, name_of(map_path), dense_layers)
    origin = origin_of(data, expert_map, name_of(map_path))
    if topology is None and origin is not None:
        topology = origin.topology
    chosen = _pick_layer(layer, int(expert_map.replica_counts().max(1).argmax()), expert_map.num_layers)
    if topology is not None:
        check_slots(expert_map, topology.num_gpus, name_of(map_path))
    if plot is not None:
        from sglang_eplb_affinity.cli.plots import plot_map

        plot_map(expert_map, topology, chosen, plot)
        click.echo(f"{plot}: written", err=True)
    if style == "json":
        click.echo(json.dumps({
            "layers": expert_map.num_layers, "experts": expert_map.num_experts, "slots": expert_map.num_slots,
            "replicas": expert_map.replica_counts().tolist(),
        }))  # fmt: skip
    else:
        if origin is not None:
            _inspect_origin(origin)
        _inspect_map(expert_map, topology, chosen)


def _pick_layer(layer: int | None, default: int, layers: int) -> int:
    if layer is not None and not 0 <= layer < layers:
        raise InputError(f"--layer {layer}: must be 0 to {layers - 1}")
    return default if layer is None else layer


def _inspect_routing(
    window: RoutingWindow, trace: RoutingTrace | None, expert_map: ExpertMap | None, topology: Topology | None,
    rule: DispatchRule, layer: int | None, style: str, plot: Path | None,
) -> None:  # fmt: skip
    busy = window.counts.any(1)
    skew = np.where(busy, window.counts.max(1) / np.maximum(window.counts.mean(1), 1e-9), 0)
    chosen = _pick_layer(layer, int(skew.argmax()), window.num_layers)
    picture = picture_of(window, chosen, expert_map, topology, rule)
    if plot is not None:  # first, so that a picture that cannot be made is one line and nothing else
        from sglang_eplb_affinity.cli.plots import plot_routing

        placed = expert_map is not None and topology is not None
        load = even_load(window.counts, expert_map, topology) if placed else None  # type: ignore[arg-type]
        plot_routing(window, picture, load, plot)
        click.echo(f"{plot}: written", err=True)
    if style == "json":
        pictures = [picture_of(window, i, expert_map, topology, rule).to_json() for i in np.flatnonzero(busy).tolist()]
        click.echo(json.dumps({
            "layers": window.num_layers, "experts": window.num_experts,
            "tokens": None if trace is None else trace.num_tokens, "max_over_mean_expert": skew.tolist(),
            "dispatch": rule, "per_layer": pictures,
        }))  # fmt: skip
    else:
        if trace is not None:
            _describe(trace)
        else:
            click.echo(f"{window.num_layers} layers ({int((~busy).sum())} without traffic), {window.num_experts} "
                       f"experts, {int(window.counts.sum(1).max())} assignments in the busiest")  # fmt: skip
        click.echo(
            f"hottest expert over mean expert: median {np.median(skew[busy]):.2f}, "
            f"largest {skew.max():.2f} (layer {skew.argmax()})"
        )
        click.echo(picture.text())


def _describe(trace: RoutingTrace) -> None:
    click.echo(
        f"{trace.num_tokens} tokens, {trace.num_layers} layers, top-{trace.top_k} of {trace.num_experts} experts"
    )
    if trace.sequence is not None:
        click.echo(f"{len(np.unique(trace.sequence))} sequences")
    if trace.domain is not None:
        for index, count in zip(*np.unique(trace.domain, return_counts=True), strict=True):
            name = trace.domain_names[index] if trace.domain_names else index
            click.echo(f"domain {name}: {count} tokens")


def _inspect_origin(origin: MapOrigin) -> None:
    model, topology = origin.model, origin.topology
    click.echo(
        f"recorded {origin.written} in round {origin.round} of {origin.algorithm}, "
        f"SGLang {origin.sglang_version}, sglang_eplb_affinity {origin.package_version}"
    )
    click.echo(
        f"for {model.architecture} ({model.path}), top-{model.top_k} of {model.num_experts} experts, "
        f"{topology.num_gpus} GPUs on {topology.num_nodes} nodes, replica choice {origin.dispatch}"
    )
    click.echo(f"planned from routing {origin.routing_checksum} ({origin.routing_tokens} assignments a layer); on it:")
    for name, figures in (("contiguous", origin.contiguous), ("this map", origin.recorded)):
        if figures is not None:
            click.echo(
                f"  {name}: balancedness {figures.balancedness:.4f}, GPU fan-out {figures.gpu_fanout:.4f}, "
                f"node fan-out {figures.node_fanout:.4f}"
            )


def _inspect_map(expert_map: ExpertMap, topology: Topology | None, chosen: int) -> None:
    replicas = expert_map.replica_counts()
    click.echo(
        f"{expert_map.num_layers} layers, {expert_map.num_experts} experts in {expert_map.num_slots} slots "
        f"({expert_map.num_slots - expert_map.num_experts} redundant)"
    )
    for number in range(1, int(replicas.max()) + 1):
        share = (replicas == number).sum() / replicas.shape[0]
        if share:
            click.echo(f"experts with {number} replica{'s' if number > 1 else ''}: {share:.1f} per layer")
    if topology is not None:
        slots_per_gpu = topology.slots_per_gpu(expert_map.num_slots)
        by_gpu = expert_map.physical_to_logical.reshape(expert_map.num_layers, topology.num_gpus, slots_per_gpu)
        twice = sum(slots_per_gpu - len(set(gpu.tolist())) for row in by_gpu for gpu in row)
        click.echo(f"slots wasted on a second replica on the same GPU: {twice}")
        click.echo(f"layer {chosen}:")
        for gpu in range(topology.num_gpus):
            ids = " ".join(map(str, by_gpu[chosen, gpu].tolist()))
            click.echo(f"  node {gpu // topology.gpus_per_node} GPU {gpu}: {ids}")
