"""`python -m bench.micro.forced_routing --out FILE.json`: what forced routing costs a layer, on this machine's GPU.

Times the ids of one layer inside a CUDA graph of many layers (GPU time, no launch gaps), the same launched one by one,
and the way of LightLLM's fake balance (PR 962), which builds a table for each number of tokens with a loop over tokens
and slots that picks a least loaded expert at random.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bench.harness.environment import now, provenance
from bench.harness.output_paths import result_file, write_result
from sglang_eplb_affinity.device.forced_routing import ForcedRouting
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.topology import Topology

TOKENS = (1, 128, 8192)
LOOP_TOKENS = (16, 64)
REPEATS = 30


def least_loaded_ids(num_tokens: int, num_experts: int, top_k: int, device: str) -> torch.Tensor:
    """int32 [num_tokens, k] by the rule of LightLLM's fake balance, one expert at a time on ``device``."""
    load = torch.zeros(num_experts, dtype=torch.int32, device=device)
    ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=device)
    for token in range(num_tokens):
        taken = torch.zeros(num_experts, dtype=torch.bool, device=device)
        for slot in range(top_k):
            free = load.masked_fill(taken, torch.iinfo(torch.int32).max)
            ties = (free == free.min()).nonzero().flatten()
            expert = ties[torch.randint(len(ties), (), device=device)]
            ids[token, slot] = expert
            load[expert] += 1
            taken[expert] = True
    return ids


def graph_us(work: Callable[[], None], per_replay: int) -> np.ndarray:
    """float64 [REPEATS]: us of GPU time for one of the ``per_replay`` units that ``work`` launches."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return _timed(graph.replay, per_replay)


def _timed(launch: Callable[[], Any], per_launch: int) -> np.ndarray:
    out = []
    for _ in range(3 + REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launch()
        end.record()
        torch.cuda.synchronize()
        out.append(begin.elapsed_time(end) * 1e3 / per_launch)
    return np.array(out[3:])


def summary(times: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(times, [10, 50, 90])
    return {"median": round(median, 3), "p10": round(low, 3), "p90": round(high, 3)}


def measure(layers: int, experts: int, top_k: int, gpus: int) -> dict[str, Any]:
    result: dict[str, Any] = {"layers": layers, "experts": experts, "top_k": top_k, "apply_us_per_layer": {}}
    forced = ForcedRouting.from_flag(
        "balanced",
        moe_layers=range(layers),
        num_experts=experts,
        top_k=top_k,
        topology=Topology(gpus),
        device="cuda",
    )
    for tokens in TOKENS:
        ids = torch.zeros((tokens, top_k), dtype=torch.int32, device="cuda")

        def all_layers(ids: torch.Tensor = ids) -> None:
            for layer in range(layers):
                forced.apply(layer, ids)

        result["apply_us_per_layer"][str(tokens)] = {
            "graph": summary(graph_us(all_layers, layers)),
            "launched": summary(_timed(all_layers, layers)),
        }
    result["loop_us_per_token"] = {}
    least_loaded_ids(2, experts, top_k, "cuda")
    for tokens in LOOP_TOKENS:
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            least_loaded_ids(tokens, experts, top_k, "cuda")
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e6 / tokens)
        result["loop_us_per_token"][str(tokens)] = summary(np.array(times))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.forced_routing", description=__doc__)
    parser.add_argument("--out", required=True, type=result_file, help="result file (JSON)")
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=8, help="expert-parallel size that the ids are made for")
    options = parser.parse_args(arguments)
    try:
        if not torch.cuda.is_available():
            raise InputError("bench.micro.forced_routing: needs a CUDA GPU, but PyTorch sees none")
        result = measure(options.layers, options.experts, options.top_k, options.gpus)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result |= {"date": now(), "provenance": provenance()}
    write_result(options.out, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
