"""``plan``: a map from a trace or from SGLang's recorder dumps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import click

from sglang_eplb_affinity.cli.options import (
    FILE,
    FINITE,
    check_output,
    dense_layers_option,
    say,
    seed_option,
    topology_of,
    topology_options,
)
from sglang_eplb_affinity.cli.plan_flags import check_current, check_flags, check_further_slots, flags_named, slots_of
from sglang_eplb_affinity.cli.progress import progress
from sglang_eplb_affinity.dispatch.primaries import uneven_layers
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.reading import name_of
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.dumps import dense_rows, read_dumps
from sglang_eplb_affinity.formats.maps import load_map
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan
from sglang_eplb_affinity.planner.config import Effort, Objective
from sglang_eplb_affinity.planner.redundancy import redundancies_within, slots_within, try_redundancies
from sglang_eplb_affinity.planner.survival import SURVIVE, Survive

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
    "--redundant", default="0", show_default=True,
    help="Redundant experts (slots beyond the experts); `auto`: the knee of what they save, within --memory-gb.",
)  # fmt: skip
@click.option("--memory-gb", type=FINITE, help="Memory free for experts on each GPU, for --redundant auto.")
@click.option(
    "--expert-mb", type=FINITE, help="MB of one expert of one layer, for --redundant auto (DeepSeek-V3 in FP8: 44)."
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
@click.option("--objective", type=click.Choice(get_args(Objective)), default="normal", show_default=True)
@click.option(
    "--prefill-share",
    type=FINITE,
    default=None,
    help="Weight of normal mode in mixed (default: of the dump, else 0.5).",
)
@click.option(
    "--dispatch", type=click.Choice(DISPATCH_RULES), default="cover_balanced", show_default=True,
    help="Replica choice of the server; the map is planned and its load judged with it.",
)  # fmt: skip
@click.option(
    "--further-slots", type=click.IntRange(0), default=0, show_default=True,
    help="Slots of each GPU that small passes use besides the primary ones; needs --dispatch primary.",
)  # fmt: skip
@click.option(
    "--max-load-increase", type=FINITE, default=0.01, show_default=True,
    help="Largest rise of the most loaded GPU over EPLB's own placement (0.01 = 1 %).",
)  # fmt: skip
@click.option(
    "--load-noise-allowance", type=FINITE, default=1.0, show_default=True,
    help="The cap rises by so many standard errors of a GPU's load in the trace; 0: strict on the trace.",
)  # fmt: skip
@click.option(
    "--p95-allowance", type=FINITE,
    help="Accept a layer's plan only if its load's 95th percentile, over runs of the trace, is at most this fraction "
    "above EPLB's own placement's (0.1 = 10 %).  [default: the mean decides]",
)  # fmt: skip
@click.option(
    "--node-weight", type=int, default=2, show_default=True,
    help="Cost of a copy to another node, in copies to another GPU.",
)  # fmt: skip
@click.option(
    "--survive", type=click.Choice(SURVIVE), default="none", show_default=True,
    help="Every expert on two ranks or nodes where the slots allow, so that none is lost with one.",
)  # fmt: skip
@click.option("--current-map", type=FILE, help="Map in use: the plan then moves few experts.")
@click.option("--max-moves", type=int, help="At most so many new experts per GPU and layer; needs --current-map.")
@click.option("--effort", type=click.Choice(["fast", "thorough"]), default="thorough", show_default=True)
@seed_option
@click.option("--threads", type=int, help="Worker threads.  [default: from the cores]")
@dense_layers_option
@click.option("--out", type=FILE, required=True, help="Map file to write (SGLang's JSON).")
@click.option("--report", type=FILE, help="Also write the per-layer report (JSON).")
def plan_command(
    trace: Path | None, dumps: tuple[Path, ...], gpus: int, nodes: int, redundant: str,
    memory_gb: float | None, expert_mb: float | None, algorithm: str,
    groups: int | None, objective: Objective, prefill_share: float | None, dispatch: DispatchRule,
    further_slots: int, max_load_increase: float, load_noise_allowance: float, p95_allowance: float | None,
    node_weight: int, survive: Survive, current_map: Path | None, max_moves: int | None, effort: Effort, seed: int,
    threads: int | None, dense_layers: int, out: Path, report: Path | None,
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
    check_flags(topology, click.get_current_context().params)
    with flags_named():
        config = PlannerConfig(
            objective=objective, prefill_share=prefill_share, max_load_increase=max_load_increase,
            load_noise_allowance=load_noise_allowance, p95_allowance=p95_allowance, node_weight=node_weight,
            num_groups=groups, effort=effort, dispatch=dispatch, further_slots=further_slots, seed=seed,
            max_moves=max_moves, survive=survive, threads=threads,
        )  # fmt: skip
    for path in (out, report):
        if path is not None:
            check_output(path)
    window = _window(trace, dumps, seed)
    added = dense_layers - dense_rows(window, dense_layers, name_of(trace or dumps[0]))
    if redundant == "auto":
        assert memory_gb is not None and expert_mb is not None
        found = _auto_redundant(window, topology, config, memory_gb, expert_mb)
        check_further_slots(further_slots, found, gpus)
        slots = window.num_experts + found
    else:
        slots = slots_of(int(redundant), window.num_experts, gpus)
    current = None
    if current_map is not None:
        read = load_map(current_map, dense_layers, window.num_experts, gpus)
        current = read.aligned(window.num_layers, dense_layers, name_of(current_map), "the routing")
        check_current(current, window.num_experts, int(redundant), name_of(current_map))
    if algorithm != "affinity":
        if not window.counts.any():
            raise InputError("routing window: empty, no tokens were recorded")
        hierarchical = algorithm == "deepseek_hierarchical"
        placed = eplb_placement(window.counts, topology, slots, hierarchical=hierarchical, num_groups=groups)
        placed.aligned(placed.num_layers + added, dense_layers, str(out), "the model").save(out)
        click.echo(f"{out}: {window.num_layers} layers, {slots} slots by {algorithm}", err=True)
        uneven = uneven_layers(placed, topology) if dispatch == "primary" else ()
        if len(uneven):
            say(
                f"{out}: {len(uneven)} of {window.num_layers} layers allow no even choice of one active slot an "
                "expert; --algorithm affinity makes maps that do"
            )
        return
    with progress(window.num_layers, "planning") as done:
        planned = plan(window, topology, slots, config, current, progress=done)
    planned.expert_map.aligned(window.num_layers + added, dense_layers, str(out), "the model").save(out)
    if report is not None:
        write_atomically(report, json.dumps(planned.report.to_json()).encode())
    click.echo(f"{out}: {planned.report.summary()}", err=True)


def _auto_redundant(
    window: RoutingWindow, topology: Topology, config: PlannerConfig, memory_gb: float, expert_mb: float
) -> int:
    """Try redundancies up to the budget at fast effort, print what each saves, and return the knee."""
    if not window.counts.any():
        raise InputError("routing window: empty, no tokens were recorded")
    if window.tokens is None and window.coactivation is None:
        raise InputError(
            "--redundant auto: weighs what replicas save in dispatch, but the recording holds counts only; "
            "give a number"
        )
    layers = int(window.counts.any(1).sum())
    per_gpu = slots_within(memory_gb * 1e9, expert_mb * 1e6, layers)
    try:
        numbers = redundancies_within(window.num_experts, topology.num_gpus, per_gpu)
    except InputError as error:
        raise InputError(f"--memory-gb {memory_gb:g} --expert-mb {expert_mb:g}: {error}") from None
    quick = replace(config, effort="fast", max_moves=None, minimum_gain=None)
    with progress(len(numbers) * window.num_layers, "trying") as done:
        rows, at = try_redundancies(window, topology, quick, numbers, done)
    best = min(row.eplb_cost for row in rows)
    for i, row in enumerate(rows):
        gigabytes = (window.num_experts + row.redundant) // topology.num_gpus * layers * expert_mb / 1e3
        saved = 100 * (1 - row.cost / best) if best else 0.0  # one GPU: nothing to dispatch
        click.echo(
            f"{row.redundant:5d} redundant, {gigabytes:6.1f} GB a GPU: dispatch cost {-saved:+6.1f} % to EPLB's best, "
            f"GPU fan-out {row.gpu_fanout:.3f}, load {row.load:.3f}{'  <- knee, taken' if i == at else ''}",
            err=True,
        )
    return rows[at].redundant


def _window(trace: Path | None, dumps: tuple[Path, ...], seed: int) -> RoutingWindow:
    if trace is not None:
        return RoutingWindow.from_trace(RoutingTrace.load(trace), SAMPLE_TOKENS, seed)
    window = read_dumps(dumps, SAMPLE_TOKENS, seed, note=say)
    if window.tokens is None:
        say(f"{name_of(dumps[0])}: holds counts only: planned for load; fan-out is unknown")
    return window
