"""`python -m bench.planner.pass_balance --trace FILE`: load of single passes and fan-out under every replica choice.

Maps are planned on half of a trace's sequences and measured on the other half, pass by pass: N tokens of every GPU.
`lp` is an exact linear programme (scipy) that makes the most loaded GPU of each pass as light as the map allows: it
knows the tokens of all GPUs, which the rules do not, and deals each expert's tokens out to its replicas at random by
the shares it finds. `mixed` passes hold held-out tokens at random; in `own` passes each GPU has its own sequences.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.harness.environment import now, provenance, versions
from bench.planner.quality import Case, Split
from sglang_eplb_affinity.dispatch.evaluate import dealt_sources, measure, passes_of
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan

ARMS: tuple[tuple[str, str, DispatchRule], ...] = (
    ("EPLB, static", "eplb", "static"), ("EPLB, dynamic (random)", "eplb", "dynamic"),
    ("affinity, dynamic (random)", "affinity", "dynamic"), ("affinity, cover", "affinity", "cover"),
    ("affinity, cover_balanced", "affinity", "cover_balanced"),
)  # fmt: skip


def least_load(experts: np.ndarray, row: np.ndarray, num_experts: int, gpus: int) -> np.ndarray:
    """float64 [slots]: tokens of each slot so that the most loaded GPU has fewest; ``experts`` int [assignments]."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    slots = len(row)
    of_gpu = np.arange(slots) // (slots // gpus)
    ones = np.ones(slots)
    # Variables: tokens of each slot, and the largest load.
    same = coo_matrix((ones, (row, np.arange(slots))), (num_experts, slots + 1))
    below = coo_matrix(
        (np.r_[ones, -np.ones(gpus)], (np.r_[of_gpu, np.arange(gpus)], np.r_[np.arange(slots), [slots] * gpus])),
        (gpus, slots + 1),
    )
    counts = np.bincount(experts, minlength=num_experts)
    found = linprog(np.r_[np.zeros(slots), 1.0], below, np.zeros(gpus), same, counts, method="highs")
    if not found.success:
        raise RuntimeError(f"linear programme: {found.message}")
    return np.asarray(found.x[:slots])


def deal(experts: np.ndarray, shares: np.ndarray, row: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """int64 [assignments]: a slot for each, so many of each slot as ``shares`` say, rounded, in random order."""
    slots = np.empty(len(experts), np.int64)
    for expert in np.unique(experts):
        where = random.permutation(np.flatnonzero(experts == expert))
        replicas = np.flatnonzero(row == expert)
        ends = np.rint(np.cumsum(shares[replicas]) / max(shares[replicas].sum(), 1e-9) * len(where)).astype(np.int64)
        slots[where] = replicas[np.searchsorted(ends, np.arange(len(where)), side="right").clip(max=len(replicas) - 1)]
    return slots


def lp_figures(
    tokens: np.ndarray, expert_map: ExpertMap, topology: Topology, source: np.ndarray, pass_tokens: int
) -> dict[str, float]:
    """As a row of the other arms; ``tokens`` int16 [layers, T, k]."""
    pass_of, complete = passes_of(tokens.shape[1], source, topology, pass_tokens)
    slots_per_gpu = topology.slots_per_gpu(expert_map.num_slots)
    random = np.random.default_rng(0)
    gpu_fanout, node_fanout, loads = [], [], []
    for layer, row in enumerate(expert_map.physical_to_logical):
        for number in range(complete):
            chosen = tokens[layer] if not len(pass_of) else tokens[layer][pass_of == number]
            experts = chosen.ravel().astype(np.int64)
            shares = least_load(experts, row, expert_map.num_experts, topology.num_gpus)
            gpu = (deal(experts, shares, row, random) // slots_per_gpu).reshape(chosen.shape)
            load = np.bincount(gpu.ravel(), minlength=topology.num_gpus)
            loads.append(load.max() / load.mean())
            gpu_fanout.append(_distinct(gpu))
            node_fanout.append(_distinct(gpu // topology.gpus_per_node))
    return _figures(float(np.mean(gpu_fanout)), float(np.mean(node_fanout)), float(np.mean(loads)))


def _distinct(values: np.ndarray) -> float:
    """Mean number of different values in a row."""
    ordered = np.sort(values, axis=1)
    return float((1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)).mean())


def _figures(gpu_fanout: float, node_fanout: float, load: float) -> dict[str, float]:
    return {"gpu_fanout": gpu_fanout, "node_fanout": node_fanout, "pass_load_max_over_mean": load}


def rows_of(split: Split, case: Case, pass_tokens: int, layer_step: int, passes: str) -> list[dict[str, Any]]:
    """One row per arm; ``passes``: mixed or own (see the module's text)."""
    window, topology = split.window(), case.topology
    slots = window.num_experts + case.redundant
    layers = np.arange(0, window.num_layers, layer_step)
    planned = plan(window, topology, slots, PlannerConfig(dispatch="cover")).expert_map
    maps = {"eplb": eplb_placement(window.counts, topology, slots), "affinity": planned}
    maps = {name: ExpertMap(m.physical_to_logical[layers], m.num_experts) for name, m in maps.items()}
    ids, sequence = split.test.topk_ids, split.test.sequence
    source = dealt_sources(len(ids), topology)
    if sequence is not None:  # those of the held-out half, dealt out to the GPUs
        source = (np.unique(sequence, return_inverse=True)[1] % topology.num_gpus).astype(np.int32)
    if passes == "mixed":
        ids = ids[np.random.default_rng(0).permutation(len(ids))]
        source = dealt_sources(len(ids), topology)
    tokens = np.ascontiguousarray(ids.transpose(1, 0, 2)[layers], np.int16)
    rows: list[dict[str, Any]] = []
    for arm, of, rule in ARMS:
        traffic = measure(tokens, maps[of], topology, rule, source, pass_tokens=pass_tokens)
        means = (traffic.gpu_fanout, traffic.node_fanout, traffic.pass_load_max_over_mean)
        rows.append({"arm": arm, **_figures(*(float(values.mean()) for values in means))})
    for name, label in (("eplb", "EPLB"), ("affinity", "affinity")):
        rows.append({"arm": f"{label}, lp", **lp_figures(tokens, maps[name], topology, source, pass_tokens)})
    cover = next(row for row in rows if row["arm"] == "affinity, cover")
    head = {"trace": split.name, "case": case.label, "passes": passes, "tokens_of_a_gpu": pass_tokens}
    return [{**head, **row, "fanout_ratio_to_cover": row["gpu_fanout"] / cover["gpu_fanout"]} for row in rows]


def entries(rows: list[dict[str, Any]], command: str) -> list[dict[str, Any]]:
    """Entries for results/summary.json: `cover_balanced` on each trace and case; intervals over kinds of passes."""
    source = provenance()
    fixed = {
        "kind": "simulated", "hardware": source["hardware"], "versions": versions(), "commit": source["commit"],
        "date": now(), "command": command,
    }  # fmt: skip
    of_case: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["arm"] == "affinity, cover_balanced":
            of_case.setdefault(f"{row['trace']}{row['case'].rpartition('cover')[2]}", []).append(row)
    found = []
    for case, measured in of_case.items():
        for name, key, unit in (
            ("pass_load", "pass_load_max_over_mean", "max/mean of a pass"),
            ("gpu_fanout_ratio_to_cover", "fanout_ratio_to_cover", "ratio to cover"),
        ):
            values = [float(row[key]) for row in measured]
            interval = {"value": float(np.median(values)), "lower": min(values), "upper": max(values)}
            found.append({"name": f"dispatch.balanced.{case}.{name}", **interval, "unit": unit, **fixed})
    return found


@click.command()
@click.option("--trace", "traces", multiple=True, required=True, help="FILE, or PLAN,TEST; may repeat.")
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True)
@click.option("--nodes", type=click.IntRange(1), default=2, show_default=True)
@click.option("--redundant", type=click.IntRange(1), multiple=True, default=(8, 16), show_default=True)
@click.option("--pass-tokens", type=click.IntRange(1), multiple=True, default=(50, 400), show_default=True)
@click.option("--passes", "kinds", type=click.Choice(["mixed", "own"]), multiple=True, default=("mixed", "own"))
@click.option("--layer-step", type=click.IntRange(1), default=1, show_default=True, help="Measure each n-th layer.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write to a file, not standard output.")
@click.option(
    "--entries", "entries_out", type=click.Path(dir_okay=False, path_type=Path), help="Summary entries, JSON."
)
def main(
    traces: tuple[str, ...], gpus: int, nodes: int, redundant: tuple[int, ...], pass_tokens: tuple[int, ...],
    kinds: tuple[str, ...], layer_step: int, out: Path | None, entries_out: Path | None,
) -> None:  # fmt: skip
    """Load of single passes and fan-out under every replica choice, as CSV."""
    rows: list[dict[str, Any]] = []
    for split in map(Split.load, traces):
        for case in (Case(gpus, nodes, number) for number in redundant):
            if not case.fits(split.plan.num_experts):
                raise InputError(f"--redundant {case.redundant}: does not fit {split.plan.num_experts} experts")
            for number in pass_tokens:
                for passes in kinds:
                    rows += rows_of(split, case, number, layer_step, passes)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    if entries_out is not None:
        command = " ".join(
            ["python -m bench.planner.pass_balance", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]
        )
        write_atomically(entries_out, (json.dumps(entries(rows, command), indent=1) + "\n").encode())
    if out is None:
        click.echo(buffer.getvalue().rstrip())
    else:
        write_atomically(out, buffer.getvalue().encode())


if __name__ == "__main__":
    try:
        main(prog_name="python -m bench.planner.pass_balance", standalone_mode=False)
    except (InputError, click.ClickException) as error:
        print(f"error: {error.format_message() if isinstance(error, click.ClickException) else error}", file=sys.stderr)
        sys.exit(2)
