"""``inspect``: what is in a map or a trace, with a plot."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from sglang_eplb_affinity.cli.options import FILE, check_output, topology_of
from sglang_eplb_affinity.domain.content import read_content
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.maps import parse_map
from sglang_eplb_affinity.formats.recorded_map import MapOrigin, origin_of


@click.command("inspect")
@click.option("--map", "map_path", type=FILE, help="Expert map to describe.")
@click.option("--trace", "trace_path", type=FILE, help="Routing trace to describe.")
@click.option("--gpus", type=int, help="GPUs, for a map: also tells what each GPU holds.")
@click.option("--nodes", type=int, default=1, show_default=True)
@click.option("--layer", type=int, help="Layer to plot in detail.  [default: the most skewed]")
@click.option("--plot", type=FILE, help="Write a picture (.png).")
def inspect_command(
    map_path: Path | None, trace_path: Path | None, gpus: int | None, nodes: int, layer: int | None, plot: Path | None
) -> None:
    """Describe one map or one trace: shapes, skew, replicas, the experts that fire together.

    \b
    Example:
      python -m sglang_eplb_affinity inspect --trace trace.npz --plot trace.png
      python -m sglang_eplb_affinity inspect --map map.json --gpus 8 --nodes 2
    """
    if (map_path is None) == (trace_path is None):
        raise InputError("give either --map or --trace")
    if plot is not None:
        check_output(plot)
        if plot.suffix != ".png":
            raise InputError(f"--plot {plot}: must end in .png")
    if trace_path is not None:
        _inspect_trace(RoutingTrace.load(trace_path), layer, plot)
    else:
        assert map_path is not None
        data = read_content(map_path)
        expert_map = parse_map(data, str(map_path))
        origin = origin_of(data, expert_map, str(map_path))
        if origin is not None:
            _inspect_origin(origin)
        recorded = None if origin is None else origin.topology
        _inspect_map(expert_map, recorded if gpus is None else topology_of(gpus, nodes), layer, plot)


def _pick_layer(layer: int | None, default: int, layers: int) -> int:
    if layer is not None and not 0 <= layer < layers:
        raise InputError(f"--layer {layer}: must be 0 to {layers - 1}")
    return default if layer is None else layer


def _inspect_trace(trace: RoutingTrace, layer: int | None, plot: Path | None) -> None:
    window = RoutingWindow.from_trace(trace, 1)
    skew = window.counts.max(1) / window.counts.mean(1)
    chosen = _pick_layer(layer, int(skew.argmax()), trace.num_layers)
    click.echo(
        f"{trace.num_tokens} tokens, {trace.num_layers} layers, top-{trace.top_k} of {trace.num_experts} experts"
    )
    if trace.sequence is not None:
        click.echo(f"{len(np.unique(trace.sequence))} sequences")
    for index, name in enumerate(trace.domain_names):
        if trace.domain is not None:
            click.echo(f"domain {name}: {int((trace.domain == index).sum())} tokens")
    click.echo(
        f"hottest expert over mean expert: median {np.median(skew):.2f}, "
        f"largest {skew.max():.2f} (layer {skew.argmax()})"
    )
    click.echo(f"layer {chosen}: pairs that fire together most, and how much more often than independent experts would")
    assert window.coactivation is not None
    pairs = window.coactivation[chosen]
    counts = window.counts[chosen]
    upper = np.triu(pairs, 1)
    for flat in np.argsort(-upper, axis=None, kind="stable")[:5]:
        a, b = divmod(int(flat), trace.num_experts)
        if upper[a, b]:
            lift = upper[a, b] * trace.num_tokens / (counts[a] * counts[b])
            click.echo(f"  experts {a} and {b}: {upper[a, b]} tokens, {lift:.2f} times")
    if plot is not None:
        from sglang_eplb_affinity.cli.plots import plot_trace

        plot_trace(window, trace.num_tokens, chosen, plot)
        click.echo(f"{plot}: written", err=True)


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


def _inspect_map(expert_map: ExpertMap, topology: Topology | None, layer: int | None, plot: Path | None) -> None:
    replicas = expert_map.replica_counts()
    chosen = _pick_layer(layer, int(replicas.max(1).argmax()), expert_map.num_layers)
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
    if plot is not None:
        from sglang_eplb_affinity.cli.plots import plot_map

        plot_map(expert_map, plot)
        click.echo(f"{plot}: written", err=True)
