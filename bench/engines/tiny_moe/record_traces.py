"""Record which experts the model picks on text that is new to it: ``python -m bench.engines.tiny_moe.record_traces``.

Reads the test-DOMAIN.bin files of ``build_corpus`` and writes bench/data/tiny_moe_plan.npz and tiny_moe_test.npz
(:class:`RoutingTrace`). Plan sequences come from the first half of each domain's test text, test sequences from the
second, so no sequence is in both. Sequences of the domains take turns.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch

from bench.engines.tiny_moe import checkpoint
from bench.engines.tiny_moe.sources import DOMAINS
from sglang_eplb_affinity.domain.routing import RoutingTrace

DATA_FOLDER = Path(__file__).parents[2] / "data"


@torch.no_grad()
def route(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """ids [sequences, positions] -> int16 [sequences, positions, layers, k], best expert first."""
    _, _, routing = model(torch.from_numpy(ids.astype(np.int64)))
    return routing.permute(1, 2, 0, 3).to(torch.int16).numpy()


def record(model: torch.nn.Module, texts: dict[str, np.ndarray], sequences: int, length: int) -> RoutingTrace:
    """``sequences`` windows of ``length`` tokens of each domain's text, spread over it."""
    ids, domains = [], []
    for domain, text in texts.items():
        starts = np.linspace(0, len(text) - length, sequences).astype(np.int64)
        if sequences * length > len(text):
            raise click.UsageError(f"{domain}: {len(text)} tokens hold no {sequences} windows of {length}")
        ids.append(np.stack([text[start : start + length] for start in starts]))
        domains.append(np.full(sequences, DOMAINS.index(domain)))
    turns = np.arange(len(texts) * sequences).reshape(len(texts), sequences).T.ravel()
    routed = np.concatenate([route(model, block) for block in ids])[turns]
    return RoutingTrace(
        np.ascontiguousarray(routed.reshape(-1, *routed.shape[2:])),
        num_experts=model.c.num_experts,  # type: ignore[union-attr, arg-type]
        sequence=np.repeat(np.arange(len(turns), dtype=np.int32), length),
        domain=np.repeat(np.concatenate(domains)[turns].astype(np.int8), length),
        domain_names=DOMAINS,
    )


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), default=Path(".carry/tiny_moe"))
@click.option("--model", "folder", type=click.Path(path_type=Path, exists=True), default=checkpoint.MODEL_FOLDER)
@click.option("--out", type=click.Path(path_type=Path), default=DATA_FOLDER, show_default=True)
@click.option("--sequences", default=27, show_default=True, help="of each domain, in each half")
@click.option("--length", default=256, show_default=True)
def main(data: Path, folder: Path, out: Path, sequences: int, length: int) -> None:
    model = checkpoint.load(folder)
    texts = {domain: np.fromfile(data / f"test-{domain}.bin", dtype=np.uint16) for domain in DOMAINS}
    for name, half in (("plan", 0), ("test", 1)):
        parts = {d: np.array_split(text, 2)[half] for d, text in texts.items()}
        trace = record(model, parts, sequences, length)
        path = out / f"tiny_moe_{name}.npz"
        trace.save(path)
        print(f"{path}: {trace.topk_ids.shape} (tokens, layers, k), {path.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
