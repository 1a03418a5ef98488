"""``demo``: plan, evaluate and draw on a recording that comes with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click

from sglang_eplb_affinity.cli.options import FILE
from sglang_eplb_affinity.cli.plots import plot_comparison
from sglang_eplb_affinity.dispatch.evaluate import Traffic, measure_trace
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan

DATA = Path(__file__).with_name("data")
TOPOLOGY, REDUNDANT = Topology(8, 2), 16


@dataclass(frozen=True)
class Compared:
    """One placement on traffic that it was not planned on; means over layers."""

    name: str
    rule: DispatchRule
    placed: ExpertMap
    gpu_fanout: float
    node_fanout: float
    remote_node_copies: float
    load: float

    @staticmethod
    def of(name: str, rule: DispatchRule, placed: ExpertMap, trace: RoutingTrace) -> Compared:
        seen: Traffic = measure_trace(trace, placed, TOPOLOGY, rule)
        means = (seen.gpu_fanout, seen.node_fanout, seen.remote_node_copies, seen.load_max_over_mean)
        return Compared(name, rule, placed, *(float(values.mean()) for values in means))

    def line(self) -> str:
        return (
            f"{f'{self.name} ({self.rule})':18}  {self.gpu_fanout:12.2f}  {self.node_fanout:11.2f}  "
            f"{self.remote_node_copies:21.2f}  {self.load:13.3f}"
        )


def compare() -> list[Compared]:
    """No EPLB, EPLB and affinity, planned on one part of the recording and measured on the other."""
    planned_on, later = (RoutingTrace.load(DATA / f"demo_{part}.npz") for part in ("plan", "test"))
    window = RoutingWindow.from_trace(planned_on)
    slots = window.num_experts + REDUNDANT
    placements: tuple[tuple[str, DispatchRule, ExpertMap], ...] = (
        ("no EPLB", "static", ExpertMap.contiguous(window.num_layers, window.num_experts, window.num_experts)),
        ("EPLB", "static", eplb_placement(window.counts, TOPOLOGY, slots)),
        ("affinity", "cover", plan(window, TOPOLOGY, slots, PlannerConfig(dispatch="cover")).expert_map),
    )
    return [Compared.of(name, rule, placed, later) for name, rule, placed in placements]


@click.command("demo")
@click.option("--out", type=FILE, default="eplb_affinity_demo", show_default=True, help="Folder for maps and picture.")
def demo_command(out: Path) -> None:
    """Plan, evaluate and draw on a recording that comes with the package. Half a minute, no GPU, no SGLang.

    \b
    Example:
      python -m sglang_eplb_affinity demo
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made a folder ({error.strerror})") from None
    click.echo(
        f"A small MoE model's routing (64 experts, top-8, 6 layers) on {TOPOLOGY.num_gpus} GPUs of "
        f"{TOPOLOGY.num_nodes} nodes, {REDUNDANT} redundant experts.\n"
        "Planned on one part of the recording, measured on another:\n\n"
        "placement (dispatch)  GPUs/token  nodes/token  copies to other nodes  max/mean load"
    )
    found = compare()
    for compared in found:
        click.echo(compared.line())
    eplb, ours = found[1:]
    click.echo(
        f"\nAffinity against EPLB: GPUs a token visits {_change(ours.gpu_fanout, eplb.gpu_fanout)}, copies to other "
        f"nodes {_change(ours.remote_node_copies, eplb.remote_node_copies)}, load of the busiest GPU "
        f"{_change(ours.load, eplb.load)}.\nThis is one small model's traffic: yours will differ."
    )
    for compared in found[1:]:
        text = json.dumps(compared.placed.to_json())
        write_atomically(out / f"{compared.name.lower()}.json", text.encode())
    plot_comparison({c.name: (c.gpu_fanout, c.node_fanout, c.load) for c in found}, out / "demo.png")
    click.echo(
        f"\nwritten: {out / 'demo.png'}, {out / 'eplb.json'}, {out / 'affinity.json'} (maps for "
        "--init-expert-location)\n"
        f"the same in single steps: python -m sglang_eplb_affinity plan --trace {DATA / 'demo_plan.npz'} --gpus 8 "
        f"--nodes 2 --redundant 16 --out map.json\n"
        "on your traffic: the same with --dump FILE, a dump of SGLang's recorder (`plan --help`, `evaluate --help`)"
    )


def _change(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.1f} %"
