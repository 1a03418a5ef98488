"""Train the model on one GPU: ``python -m bench.engines.tiny_moe.train --data .carry/tiny_moe --out OUT``.

Writes OUT/model (safetensors shards, config, tokenizer) and OUT/train.csv: loss by step, validation loss by domain and
expert load (max / mean over experts, mean over layers) by domain. A toy run on a CPU: --steps 3 --batch 2 --context 128
--no-compile.
"""

from __future__ import annotations

import csv
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F

from bench.engines.tiny_moe import checkpoint
from bench.engines.tiny_moe.model import ModelConfig, TinyMoe
from bench.engines.tiny_moe.sources import DOMAINS


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def load_tokens(path: Path, device: str) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int32)).to(device)


def windows(tokens: torch.Tensor, starts: torch.Tensor, context: int) -> torch.Tensor:
    """int64 [starts, context + 1]"""
    return tokens[starts[:, None] + torch.arange(context + 1, device=tokens.device)].long()


def load_max_over_mean(ids: torch.Tensor, num_experts: int) -> float:
    """ids [layers, ...]: busiest expert over the mean, averaged over layers."""
    ratios = []
    for layer in ids.flatten(1):
        counts = torch.bincount(layer, minlength=num_experts).float()
        ratios.append((counts.max() / counts.mean()).item())
    return sum(ratios) / len(ratios)


@torch.no_grad()
def evaluate(
    run: torch.nn.Module, held: dict[str, torch.Tensor], experts: int, precision: AbstractContextManager[object]
) -> dict[str, float]:
    """Validation loss and load by domain, and over all domains in equal parts."""
    out: dict[str, float] = {}
    all_ids = []
    for domain, batch in held.items():
        with precision:
            logits, _, ids = run(batch[:, :-1])
        out[f"val_{domain}"] = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()).item()
        out[f"load_{domain}"] = load_max_over_mean(ids, experts)
        all_ids.append(ids)
    out["val"] = sum(out[f"val_{domain}"] for domain in held) / len(held)
    out["load"] = load_max_over_mean(torch.cat(all_ids, 1), experts)
    return out


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--steps", default=9000, show_default=True)
@click.option("--schedule-steps", default=0, help="length of the schedule, if the run is to stop before its end")
@click.option("--batch", default=16, show_default=True, help="windows a step")
@click.option("--context", default=2048, show_default=True)
@click.option("--lr", default=3e-3, show_default=True)
@click.option("--aux", default=0.001, show_default=True, help="weight of the load balancing loss")
@click.option("--eval-every", default=500, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
def main(
    data: Path,
    out: Path,
    steps: int,
    schedule_steps: int,
    batch: int,
    context: int,
    lr: float,
    aux: float,
    eval_every: int,
    seed: int,
    compiled: bool,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    config = replace(ModelConfig(), router_aux_loss_coef=aux)
    model = TinyMoe(config)
    model.initialize(seed)
    model.to(device)
    tokens = load_tokens(data / "train.bin", device)
    held = {}
    for domain in DOMAINS:
        text = load_tokens(data / f"val-{domain}.bin", device)
        held[domain] = windows(text, torch.linspace(0, len(text) - context - 1, batch).long().to(device), context)
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    precision: AbstractContextManager[object] = (
        torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()
    )

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, balance, _ = model(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), balance

    step_loss = torch.compile(loss_of) if compiled else loss_of
    run = torch.compile(model) if compiled else model
    generator = torch.Generator(device=device).manual_seed(seed)
    total = sum(p.numel() for p in model.parameters())
    print(f"{total / 1e6:.2f} M parameters, {len(tokens) / 1e6:.1f} M tokens, {device}, aux {aux}, lr {lr}", flush=True)
    rows: list[dict[str, float]] = []
    recent: list[torch.Tensor] = []
    begun = first = time.perf_counter()
    for step in range(steps + 1):
        if step % eval_every == 0 or step == steps:
            row = {"step": step, "tokens": step * batch * context, "seconds": round(time.perf_counter() - begun, 1)}
            row["train"] = torch.stack(recent).mean().item() if recent else float("nan")
            row |= evaluate(run, held, config.num_experts, precision)  # type: ignore[arg-type]
            rows.append({k: round(v, 4) for k, v in row.items()})
            done = time.perf_counter() - first
            rate = (step - 1) * batch * context / done if step > 1 else 0.0
            print(
                f"step {step} train {row['train']:.3f} val {row['val']:.3f} load {row['load']:.2f} by domain "
                + " ".join(f"{d}:{row[f'val_{d}']:.2f}/{row[f'load_{d}']:.1f}" for d in DOMAINS)
                + f" {rate / 1e6:.2f} Mtok/s {time.perf_counter() - begun:.0f}s",
                flush=True,
            )
            recent = []
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule_steps or steps, lr, min(300, steps // 10 + 1))
        starts = torch.randint(len(tokens) - context - 1, (batch,), generator=generator, device=device)
        sample = windows(tokens, starts, context)
        with precision:
            loss, balance = step_loss(sample[:, :-1], sample[:, 1:])
        (loss + aux * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        if step == 0:
            loss.item()
            first = time.perf_counter()
    with (out / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    checkpoint.save(model, out / "model", data / "tokenizer.json")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"trained in {time.perf_counter() - begun:.0f} s on {name}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
