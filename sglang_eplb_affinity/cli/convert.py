"""``convert``: maps between SGLang, vllm-ascend and TensorRT-LLM; responses to a trace."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click

from sglang_eplb_affinity.cli.options import FILE, check_output, dense_layers_option, topology_of
from sglang_eplb_affinity.domain.content import read_content
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.reading import name_of
from sglang_eplb_affinity.formats.maps import MAP_FORMATS, MapFormat, load_map, save_map
from sglang_eplb_affinity.formats.responses import read_responses


@click.command("convert")
@click.option(
    "--in", "source", type=FILE, required=True,
    help="Map to read; the format is recognised. For a trace: responses of SGLang or vLLM, one as JSON in each line.",
)  # fmt: skip
@click.option("--out", type=FILE, required=True, help="Map or trace to write.")
@click.option("--to", "target", type=click.Choice((*MAP_FORMATS, "trace")), required=True, help="Format to write.")
@click.option("--gpus", type=int, help="GPUs; needed for vllm-ascend, which lists experts by device.")
@click.option(
    "--in-layers", type=click.Choice(["all", "moe"]),
    help="Layers that a map in SGLang's format has: all, or MoE layers only.  [default: all]",
)  # fmt: skip
@dense_layers_option
@click.option("--experts", type=int, help="For a trace: routed experts of the model.")
@click.option("--top-k", type=int, help="For a trace of SGLang's responses: experts per token.")
@click.option("--layer-updates-per-iter", type=int, default=0, show_default=True, help="For TensorRT-LLM (0: static).")
def convert_command(
    source: Path, out: Path, target: str, gpus: int | None, in_layers: str | None, dense_layers: int,
    experts: int | None, top_k: int | None, layer_updates_per_iter: int,
) -> None:  # fmt: skip
    """Convert a map. SGLang maps end in .json or .pt, vllm-ascend's in .json, TensorRT-LLM's in .yaml.

    \b
    Example:
      python -m sglang_eplb_affinity convert --in map.json --to tensorrt-llm --dense-layers 3 --out eplb.yaml
      python -m sglang_eplb_affinity convert --in ascend.json --to sglang --dense-layers 3 --out map.json
      python -m sglang_eplb_affinity convert --in responses.jsonl --to trace --experts 128 --top-k 8 --out trace.npz
    """
    check_output(out)
    if target == "trace":
        _to_trace(source, out, experts, top_k, dense_layers)
        return
    expected = {"sglang": (".json", ".pt"), "vllm-ascend": (".json",), "tensorrt-llm": (".yaml", ".yml")}[target]
    map_format = cast(MapFormat, target)
    if str(out) != "-" and out.suffix not in expected:
        raise InputError(f"--out {out}: a map for {target} ends in {' or '.join(expected)}")
    topology = None if gpus is None else topology_of(gpus, 1)
    expert_map = load_map(source, dense_layers, num_gpus=gpus)
    if in_layers == "moe" and "physical_to_logical_map" in read_content(source):
        whole = expert_map.num_layers + dense_layers
        expert_map = expert_map.aligned(whole, dense_layers, name_of(source), "the model")
    if topology is not None:
        topology.slots_per_gpu(expert_map.num_slots)
    save_map(expert_map, out, map_format, topology, dense_layers, layer_updates_per_iter)
    click.echo(
        f"{out}: {target}, {expert_map.num_layers} layers (the first {dense_layers} dense), "
        f"{expert_map.num_experts} experts, {expert_map.num_slots} slots",
        err=True,
    )


def _to_trace(source: Path, out: Path, experts: int | None, top_k: int | None, dense_layers: int) -> None:
    if str(out) != "-" and out.suffix != ".npz":
        raise InputError(f"--out {out}: a trace ends in .npz")
    if experts is None:
        raise InputError("--to trace: give --experts, the number of routed experts of the model")
    trace = read_responses(source, experts, top_k, dense_layers)
    trace.save(out)
    assert trace.sequence is not None
    click.echo(
        f"{out}: {trace.num_tokens} tokens in {int(trace.sequence.max()) + 1} sequences, "
        f"{trace.num_layers} MoE layers, top-{trace.top_k} of {experts} experts",
        err=True,
    )
