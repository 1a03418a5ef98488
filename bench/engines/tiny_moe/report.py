"""Loss curve, expert use by domain, routing beside other traces: ``python -m bench.engines.tiny_moe.report``.

Writes into bench/engines/tiny_moe/training: loss.png, expert_use.png and routing.csv. Name other models' traces (.npz
of :class:`RoutingTrace`) as arguments to have them in routing.csv too.
"""

from __future__ import annotations

from math import comb
from pathlib import Path

import click
import matplotlib
import numpy as np
import pandas as pd

from bench.engines.tiny_moe.record_traces import DATA_FOLDER
from sglang_eplb_affinity.dispatch.evaluate import measure_trace
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import eplb_placement, plan

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent / "training"
GPUS = 8


def expert_load(trace: RoutingTrace) -> np.ndarray:
    """float64 [layers, experts]: load of each expert over the mean."""
    counts = [np.bincount(layer.ravel(), minlength=trace.num_experts) for layer in trace.topk_ids.transpose(1, 0, 2)]
    return np.stack(counts) * (trace.num_experts / (trace.num_tokens * trace.top_k))


def random_fanout(experts: int, k: int, gpus: int) -> float:
    """Expected GPUs of a token that picks k experts at random, experts placed evenly."""
    return gpus * (1 - comb(experts - experts // gpus, k) / comb(experts, k))


def halves(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """Plan and test tokens: even and odd sequences."""
    assert trace.sequence is not None
    odd = trace.sequence % 2 == 1
    return trace.select(~odd), trace.select(odd)


def row(name: str, planned: RoutingTrace, tested: RoutingTrace) -> dict[str, object]:
    """Skew of all tokens and by domain; fan-out on ``tested`` of placements made from ``planned``."""
    topology = Topology(GPUS)
    slots = planned.num_experts + GPUS
    window = RoutingWindow.from_trace(planned)
    maps = {
        "contiguous": ExpertMap.contiguous(planned.num_layers, planned.num_experts, planned.num_experts),
        "eplb": eplb_placement(window.counts, topology, slots),
        "affinity": plan(window, topology, slots).expert_map,
    }
    load = expert_load(tested).max(1)
    out: dict[str, object] = {"trace": name, "tokens": tested.num_tokens, "layers": tested.num_layers}
    out |= {"experts": tested.num_experts, "top_k": tested.top_k}
    out |= {"load_max_over_mean": load.mean(), "load_layer_min": load.min(), "load_layer_max": load.max()}
    if tested.domain is not None:
        domains = [expert_load(tested.select(tested.domain == d)).max(1).mean() for d in np.unique(tested.domain)]
        out |= {"load_domain_min": min(domains), "load_domain_max": max(domains)}
    out["fanout_random"] = random_fanout(tested.num_experts, tested.top_k, GPUS)
    for label, placement in maps.items():
        traffic = measure_trace(tested, placement, topology, "cover" if label == "affinity" else "dynamic")
        out[f"fanout_{label}"] = traffic.gpu_fanout.mean()
        out[f"gpu_load_{label}"] = traffic.load_max_over_mean.mean()
    return out


def plot_loss(path: Path) -> None:
    data = pd.read_csv(FOLDER / "train.csv")
    figure, axes = plt.subplots(figsize=(7, 4))
    million = data["tokens"] / 1e6
    axes.plot(million, data["train"], "k--", label="train (all text)")
    for column in data.columns:
        if column.startswith("val_"):
            axes.plot(million, data[column], label=column.removeprefix("val_"))
    axes.set(xlabel="tokens seen (millions)", ylabel="cross-entropy (nats a token)", ylim=(0, 5), title="Training")
    axes.legend(ncol=2, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def plot_expert_use(trace: RoutingTrace, path: Path) -> None:
    """One panel a layer: domains by experts, load over mean; experts sorted by the domain that uses them most."""
    assert trace.domain is not None
    use = np.stack([expert_load(trace.select(trace.domain == d)) for d in range(len(trace.domain_names))], 1)
    figure, panels = plt.subplots(
        trace.num_layers, 1, figsize=(9, 1.45 * trace.num_layers), sharex=True, layout="constrained"
    )
    for layer, axes in enumerate(np.atleast_1d(panels)):
        order = np.lexsort((-use[layer].max(0), use[layer].argmax(0)))
        image = axes.imshow(use[layer][:, order], aspect="auto", cmap="magma", vmin=0, vmax=5)
        axes.set_yticks(range(len(trace.domain_names)), trace.domain_names, fontsize=6)
        axes.set_ylabel(f"layer {layer}", fontsize=8)
    axes.set_xlabel("experts, sorted by the domain that uses them most")
    figure.suptitle("Expert use by domain (load over mean), held-out text", fontsize=10)
    figure.colorbar(image, ax=panels, fraction=0.02)
    figure.savefig(path, dpi=90)


@click.command()
@click.argument("others", nargs=-1, type=click.Path(path_type=Path, exists=True))
def main(others: tuple[Path, ...]) -> None:
    planned = RoutingTrace.load(DATA_FOLDER / "tiny_moe_plan.npz")
    tested = RoutingTrace.load(DATA_FOLDER / "tiny_moe_test.npz")
    plot_loss(FOLDER / "loss.png")
    plot_expert_use(tested, FOLDER / "expert_use.png")
    rows = [row("tiny_moe", planned, tested)]
    rows += [row(path.stem, *halves(RoutingTrace.load(path))) for path in others]
    table = pd.DataFrame(rows)
    table.to_csv(FOLDER / "routing.csv", index=False, float_format="%.3f")
    print(table.T.to_string(header=False, float_format=lambda value: f"{value:.3f}"))


if __name__ == "__main__":
    main()
