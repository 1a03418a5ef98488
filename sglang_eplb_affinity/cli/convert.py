"""``convert``: maps between SGLang, vllm-ascend and TensorRT-LLM."""

from __future__ import annotations

from pathlib import Path

import click

from sglang_eplb_affinity.cli.options import FILE, check_output, topology_of
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.formats.maps import MAP_FORMATS, MapFormat, load_map, save_map


@click.command("convert")
@click.option("--in", "source", type=FILE, required=True, help="Map to read; the format is recognised.")
@click.option("--out", type=FILE, required=True, help="Map to write.")
@click.option("--to", "target", type=click.Choice(MAP_FORMATS), required=True, help="Format to write.")
@click.option("--gpus", type=int, help="GPUs; needed for vllm-ascend, which lists experts by device.")
@click.option(
    "--dense-layers", type=int, default=0, show_default=True,
    help="Leading dense layers (3 for DeepSeek-V3): SGLang counts them, the other formats leave them out.",
)  # fmt: skip
@click.option("--layer-updates-per-iter", type=int, default=0, show_default=True, help="For TensorRT-LLM (0: static).")
def convert_command(
    source: Path, out: Path, target: MapFormat, gpus: int | None, dense_layers: int, layer_updates_per_iter: int
) -> None:
    """Convert a map. SGLang maps end in .json or .pt, vllm-ascend's in .json, TensorRT-LLM's in .yaml.

    \b
    Example:
      python -m sglang_eplb_affinity convert --in map.json --to tensorrt-llm --dense-layers 3 --out eplb.yaml
      python -m sglang_eplb_affinity convert --in ascend.json --to sglang --dense-layers 3 --out map.json
    """
    if dense_layers < 0:
        raise InputError(f"--dense-layers {dense_layers}: must be 0 or more")
    check_output(out)
    expected = {"sglang": (".json", ".pt"), "vllm-ascend": (".json",), "tensorrt-llm": (".yaml", ".yml")}[target]
    if out.suffix not in expected:
        raise InputError(f"--out {out}: a map for {target} ends in {' or '.join(expected)}")
    topology = None if gpus is None else topology_of(gpus, 1)
    expert_map = load_map(source, dense_layers)
    if topology is not None:
        topology.slots_per_gpu(expert_map.num_slots)
    save_map(expert_map, out, target, topology, dense_layers, layer_updates_per_iter)
    click.echo(
        f"{out}: {target}, {expert_map.num_layers} layers ({dense_layers} dense), {expert_map.num_experts} experts, "
        f"{expert_map.num_slots} slots",
        err=True,
    )
