"""``plan``: a map from a trace or from SGLang's recorder dumps."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from sglang_eplb_affinity.cli.options import FILE, check_output, dense_layers_option, say, topology_of, topology_options
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.formats.dumps import read_dumps
from sglang_eplb_affinity.formats.maps import load_map
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan
from sglang_eplb_affinity.planner.config import Effort, Objective

SAMPLE_TOKENS = 16384


@click.command("plan")
@click.option("--trace", type=FILE, help="Routing trace (.npz) to plan for.")
@click.option(
    "--dump",
    "dumps",
    type=FILE,
    multiple=True,
    help="SGLang recorder dump of any mode (.pt, .json); may repeat: weighed by tokens.",
)
@topology_options
@click.option(
    "--redundant", type=int, default=0, show_default=True, help="Redundant experts (slots beyond the experts)."
)
@click.option(
    "--algorithm",
    type=click.Choice(["affinity", "deepseek", "deepseek_hierarchical"]),
    default="affinity",
    show_default=True,
)
@click.option(
    "--num-groups", "--groups", "groups", type=int,
    help="Expert groups of the model's routing (DeepSeek-V3: 8). affinity: a further start of the search; "
    "deepseek_hierarchical: placed on nodes as a whole.  [default: none; hierarchical: one per node]",
)  # fmt: skip
@click.option("--objective", type=click.Choice(["normal", "low_latency", "mixed"]), default="normal", show_default=True)
@click.option(
    "--prefill-share", type=float, default=None, help="Weight of normal mode in mixed (default: of the dump, else 0.5)."
)
@click.option(
    "--dispatch", type=click.Choice(DISPATCH_RULES), default="cover", show_default=True,
    help="Replica choice of the server; the map is planned and its load judged with it.",
)  # fmt: skip
@click.option(
    "--max-load-increase", type=float, default=0.01, show_default=True,
    help="Largest rise of the most loaded GPU over EPLB's own placement (0.01 = 1 %).",
)  # fmt: skip
@click.option(
    "--load-noise-allowance", type=float, default=1.0, show_default=True,
    help="The cap rises by so many standard errors of a GPU's load in the trace; 0: strict on the trace.",
)  # fmt: skip
@click.option(
    "--node-weight", type=int, default=2, show_default=True,
    help="Cost of a copy to another node, in copies to another GPU.",
)  # fmt: skip
@click.option("--current-map", type=FILE, help="Map in use: the plan then moves few experts.")
@click.option("--max-moves", type=int, help="At most so many new experts per GPU and layer; needs --current-map.")
@click.option("--effort", type=click.Choice(["fast", "thorough"]), default="thorough", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=int, help="Worker threads.  [default: from the cores]")
@dense_layers_option
@click.option("--out", type=FILE, required=True, help="Map file to write (SGLang's JSON).")
@click.option("--report", type=FILE, help="Also write the per-layer report (JSON).")
def plan_command(
    trace: Path | None, dumps: tuple[Path, ...], gpus: int, nodes: int, redundant: int, algorithm: str,
    groups: int | None, objective: Objective, prefill_share: float | None, dispatch: DispatchRule,
    max_load_increase: float, load_noise_allowance: float, node_weight: int, current_map: Path | None,
    max_moves: int | None, effort: Effort, seed: int, threads: int | None, dense_layers: int,
    out: Path, report: Path | None,
) -> None:  # fmt: skip
    """Plan an expert map for one trace, or for one or several recorder dumps of one model.

    \b
    Example:
      python -m sglang_eplb_affinity plan --trace trace.npz --gpus 8 --nodes 2 --redundant 8 --out map.json
      python -m sglang.launch_server ... --init-expert-location map.json
    """
    topology = topology_of(gpus, nodes)
    if (trace is None) == (not dumps):
        raise InputError("give either --trace or --dump (once or several times)")
    if redundant < 0:
        raise InputError(f"--redundant {redundant}: must be 0 or more")
    if max_moves is not None and current_map is None:
        raise InputError(
            f"--max-moves {max_moves}: makes the plan incremental, as the server's flag does; give the current map too "
            "(--current-map)"
        )
    config = PlannerConfig(
        objective=objective, prefill_share=prefill_share, max_load_increase=max_load_increase,
        load_noise_allowance=load_noise_allowance, node_weight=node_weight, num_groups=groups, effort=effort,
        dispatch=dispatch, seed=seed, max_moves=max_moves, threads=threads,
    )  # fmt: skip
    for path in (out, report):
        if path is not None:
            check_output(path)
    window = _window(trace, dumps, seed, dense_layers)
    slots = window.num_experts + redundant
    current = None
    if current_map is not None:
        read = load_map(current_map, dense_layers, window.num_experts, gpus)
        current = read.aligned(window.num_layers, dense_layers, str(current_map), "the routing")
    added = 0 if trace is None else dense_layers  # a dump has rows for dense layers already
    if algorithm != "affinity":
        if report is not None or max_moves is not None:
            raise InputError(f"--report and --max-moves need --algorithm affinity, not {algorithm}")
        if not window.counts.any():
            raise InputError("routing window: empty, no tokens were recorded")
        hierarchical = algorithm == "deepseek_hierarchical"
        placed = eplb_placement(window.counts, topology, slots, hierarchical=hierarchical, num_groups=groups)
        placed.aligned(placed.num_layers + added, dense_layers, str(out), "the model").save(out)
        click.echo(f"{out}: {window.num_layers} layers, {slots} slots by {algorithm}", err=True)
        return
    with tqdm(total=window.num_layers, desc="planning", unit="layer", leave=False, disable=None) as bar:
        planned = plan(window, topology, slots, config, current, progress=bar.update)
    planned.expert_map.aligned(window.num_layers + added, dense_layers, str(out), "the model").save(out)
    if report is not None:
        write_atomically(report, json.dumps(planned.report.to_json()).encode())
    click.echo(f"{out}: {planned.report.summary()}", err=True)


def _window(trace: Path | None, dumps: tuple[Path, ...], seed: int, dense_layers: int) -> RoutingWindow:
    if trace is not None:
        return RoutingWindow.from_trace(RoutingTrace.load(trace), SAMPLE_TOKENS, seed)
    window = read_dumps(dumps, SAMPLE_TOKENS, seed, note=say)
    busy = np.flatnonzero(window.counts[:dense_layers].any(1))
    if len(busy):
        raise InputError(f"--dense-layers {dense_layers}: but layer {busy[0]} of {dumps[0]} has traffic")
    if window.tokens is None:
        say(f"{dumps[0]}: holds counts only: planned for load; fan-out is unknown")
    return window
