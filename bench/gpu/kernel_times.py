"""`python -m bench.gpu.kernel_times --out FILE.json`: mapping and recording one layer's top-k ids, ours and SGLang's.

SGLang's path is what its server runs with EPLB on: the compiled `_biased_grouped_topk_postprocess` (replica choice by
`randint` or by a table, padding mask) and the counting of `_SelectExpertsSinglePassGatherer` (scatter_add). Ours is one
kernel for both, which also keeps the token sample. An empty kernel shows what any launch costs. Each is timed inside a
CUDA graph of many layers (GPU time) and launched one by one (what eager prefill pays). `upstream_lp` is SGLang's choice
by a linear programme in each layer (its counts, its solver and its draw, without the all-reduce between them), measured
where its solver compiles (nvidia-mathdx). `matrix_product` is what the co-activation of a pass would cost as a product
of indicator rows; ours takes it from the sample instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.gpu.flags import need_gpus
from bench.gpu.kernel_report import entries, ratios
from bench.harness.engine import ROOT
from bench.harness.environment import now, provenance
from bench.harness.output_paths import result_file, write_result
from sglang_eplb_affinity.device.launch_shape import LaunchShapes
from sglang_eplb_affinity.device.map_and_record import LayerTables, MapAndRecord, Placement
from sglang_eplb_affinity.device.recorder import AffinityRecorder, RecorderConfig, RowLayout
from sglang_eplb_affinity.dispatch.rules import KERNEL_RULES, DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology

TOKENS = (1, 16, 128, 1024, 8192)
EXPERTS = (64, 128, 256)
TOP_K = (4, 8)
LAYERS = 48
REPEATS = 25
GPUS, NODES, REDUNDANT = 32, 4, 32

Work = Callable[[int], object]


class Cell:
    """Inputs of one size: ids of every layer, restored before each measurement because ours overwrites them."""

    def __init__(self, tokens: int, experts: int, top_k: int) -> None:
        random = np.random.default_rng(tokens * 1000 + experts + top_k)
        self.tokens, self.experts, self.top_k = tokens, experts, top_k
        # Skewed like routers are: a few experts take much of the traffic.
        logits = torch.from_numpy(np.log(random.gamma(0.7, size=experts))).float().cuda()
        device_random = torch.Generator("cuda").manual_seed(tokens * 1000 + experts + top_k)
        draws = torch.empty(LAYERS, tokens, experts, device="cuda").exponential_(generator=device_random)
        # Adding Gumbel noise and taking the largest draws without replacement.
        self.original = (logits - draws.log()).topk(top_k, dim=2).indices.int()
        self.ids = self.original.clone()
        self.valid = torch.tensor(tokens, dtype=torch.int32, device="cuda")
        slots = np.concatenate([np.arange(experts), random.choice(experts, REDUNDANT, replace=False)])
        self.map = ExpertMap(np.tile(random.permutation(slots), (LAYERS, 1)), experts)
        wide = np.full((LAYERS, experts, self.map.num_slots), -1, np.int64)
        found = self.map.logical_to_all_physical()
        wide[:, :, : found.shape[2]] = found
        self.replicas = torch.from_numpy(wide).cuda()
        self.counts = torch.from_numpy(self.map.replica_counts().astype(np.int64)).cuda()
        self.static = self.replicas[:, :, 0].contiguous()

    def restore(self) -> None:
        self.ids.copy_(self.original)

    def step(self, shapes: LaunchShapes | None = None, recorded: bool = True) -> MapAndRecord:
        """One in the middle of a window: the sample is full, and this pass replaces a few of its tokens."""
        recorder = None
        if recorded:
            config = RecorderConfig(max_pass_tokens=65536)
            recorder = AffinityRecorder(
                num_layers=LAYERS, num_experts=self.experts, top_k=self.top_k, device="cuda", config=config
            )
            for _ in range(8):
                recorder.begin_pass([8192])
            recorder.begin_pass([self.tokens], phase=1)
        placement = Placement(Topology(GPUS, NODES), self.map.num_slots, REDUNDANT + 1, 3)
        return MapAndRecord(self.top_k, recorder, placement, shapes)

    def tables(self, rule: DispatchRule) -> list[LayerTables]:
        if rule == "static":
            return [LayerTables(rule, self.static[layer]) for layer in range(LAYERS)]
        return [LayerTables(rule, self.replicas[layer], self.counts[layer]) for layer in range(LAYERS)]

    def ours(self, rule: DispatchRule, step: MapAndRecord | None = None) -> Work:
        step, tables, rows = step or self.step(), self.tables(rule), RowLayout((self.tokens,))
        return lambda layer: step(layer, self.ids[layer], rows, tables[layer], self.valid)

    def upstream(self, rule: str) -> Work:
        from sglang.srt.eplb.expert_distribution import _SelectExpertsSinglePassGatherer
        from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo
        from sglang.srt.layers.moe.topk import _biased_grouped_topk_postprocess

        metadata: Any = SimpleNamespace(
            num_layers=LAYERS, num_physical_experts=self.map.num_slots, num_local_physical_experts=1
        )
        gatherer = _SelectExpertsSinglePassGatherer(metadata, 0)
        infos = [
            ExpertLocationDispatchInfo(rule, self.static[i], self.replicas[i], self.counts[i], self.map.num_slots)
            for i in range(LAYERS)
        ]

        def work(layer: int) -> None:
            physical = _biased_grouped_topk_postprocess(self.ids[layer], infos[layer], self.valid)
            gatherer.on_select_experts(layer, physical)

        return work

    def upstream_lp(self) -> Work | None:
        """None where this SGLang or this machine has no solver."""
        try:
            from sglang.kernels.ops.lplb import cuda_solver
            from sglang.srt.eplb.lplb_solver import LPLBSolver

            slots = torch.from_numpy(self.map.physical_to_logical[0].astype(np.int64)).cuda()
            solver = LPLBSolver(slots, self.replicas[0], GPUS, None, self.counts[0])
        except (ImportError, RuntimeError) as error:
            print(f"upstream_lp: not measured: {str(error).splitlines()[0]}", file=sys.stderr)
            return None
        table = self.replicas[0].int()

        def work(layer: int) -> None:
            share = solver.solve(self.ids[layer])
            cuda_solver.dispatch_probability(self.ids[layer], share, table)

        return work

    def matrix_product(self) -> Work:
        total = torch.zeros(self.experts, self.experts, device="cuda")

        def work(layer: int) -> None:
            hot = torch.zeros(self.tokens, self.experts, device="cuda")
            hot.scatter_(1, self.ids[layer].long(), 1.0)
            total.addmm_(hot.t(), hot)

        return work


def empty_kernel() -> Work:
    import triton

    @triton.jit
    def nothing():  # type: ignore[no-untyped-def]
        pass

    return lambda _: nothing[(1,)](num_warps=4)


def measure(work: Work, restore: Callable[[], None]) -> dict[str, dict[str, float]]:
    """us of one layer: median, 10th and 90th percentile over repeats, in a graph and launched one by one."""

    def launch() -> None:
        for layer in range(LAYERS):
            work(layer)

    return {"graph": measure_graph(work, restore), "eager": _summary(_timed(launch, restore))}


def measure_graph(work: Work, restore: Callable[[], None]) -> dict[str, float]:
    """us of one layer in a CUDA graph of all of them."""
    restore()
    for layer in range(LAYERS):
        work(layer)
    torch.cuda.synchronize()
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            work(layer)
    return _summary(_timed(graph.replay, restore))


def _timed(launch: Callable[[], Any], restore: Callable[[], None]) -> np.ndarray:
    out = []
    for _ in range(3 + REPEATS):
        restore()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launch()
        end.record()
        torch.cuda.synchronize()
        out.append(begin.elapsed_time(end) * 1e3 / LAYERS)
    return np.array(out[3:])


def _summary(times: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(times, [10, 50, 90])
    return {"median": round(median, 3), "p10": round(low, 3), "p90": round(high, 3)}


def measure_cell(tokens: int, experts: int, top_k: int) -> dict[str, Any]:
    cell = Cell(tokens, experts, top_k)
    arms = {f"ours_{rule}": cell.ours(rule) for rule in KERNEL_RULES}
    arms |= {f"upstream_{rule}": cell.upstream(rule) for rule in ("dynamic", "static")}
    by_programme = cell.upstream_lp()
    arms |= {"upstream_lp": by_programme} if by_programme is not None else {}
    arms |= {"matrix_product": cell.matrix_product(), "empty": empty_kernel()}
    with torch.inference_mode():
        return {
            "tokens": tokens,
            "experts": experts,
            "top_k": top_k,
            "us": {name: measure(work, cell.restore) for name, work in arms.items()},
        }


def sizes(only: Sequence[str] = ()) -> list[tuple[int, int, int]]:
    """(tokens, experts, top-k) to measure: all, or those given as TOKENS/EXPERTS/TOPK."""
    if not only:
        return [(tokens, experts, top_k) for experts in EXPERTS for top_k in TOP_K for tokens in TOKENS]
    found = []
    for text in only:
        parts = text.split("/")
        if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
            raise InputError(f"--only {text}: not TOKENS/EXPERTS/TOPK, such as 128/256/8")
        tokens, experts, top_k = map(int, parts)
        if top_k > experts or experts % GPUS:
            raise InputError(f"--only {text}: experts must be a multiple of {GPUS}, and top-k no more than that")
        found.append((tokens, experts, top_k))
    return found


def measure_sizes(wanted: Sequence[tuple[int, int, int]], out: Path, gpus: int) -> list[dict[str, Any]]:
    """Cells of all sizes; with several GPUs each measures the sizes of some numbers of experts, in its own process."""
    kinds = sorted({experts for _, experts, _ in wanted})
    shares = [[size for size in wanted if kinds.index(size[1]) % gpus == gpu] for gpu in range(gpus)]
    processes = []
    for gpu, share in enumerate(shares):
        part = out.with_name(f"{out.name}.gpu{gpu}")
        command = [sys.executable, "-m", "bench.gpu.kernel_times", "--out", str(part), "--gpus", "1"]
        command += [f"--only={'/'.join(map(str, size))}" for size in share]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")[gpu]
        if share:
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
            processes.append((part, subprocess.Popen(command, env=environment, cwd=ROOT)))
    codes = [process.wait() for _, process in processes]
    if any(codes):
        raise RuntimeError(f"a process that measures ended with exit code {max(codes)}; see above")
    cells = [cell for part, _ in processes for cell in json.loads(part.read_text())["cells"]]
    for part, _ in processes:
        part.unlink()
    return sorted(cells, key=lambda cell: wanted.index((cell["tokens"], cell["experts"], cell["top_k"])))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.kernel_times", description=__doc__)
    parser.add_argument("--out", required=True, type=result_file, help="result file (JSON)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TOKENS/EXPERTS/TOPK", help="this size only; may be repeated"
    )
    parser.add_argument("--gpus", type=int, default=1, help="share the sizes out to so many GPUs")
    options = parser.parse_args(arguments)
    try:
        wanted = sizes(options.only)
        need_gpus("bench.gpu.kernel_times", options.gpus)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cells = measure_sizes(wanted, options.out, options.gpus) if options.gpus > 1 else []
    for tokens, experts, top_k in wanted if options.gpus == 1 else ():
        cells.append(measure_cell(tokens, experts, top_k))
        medians = {name: times["graph"]["median"] for name, times in cells[-1]["us"].items()}
        print(f"{tokens} tokens, {experts} experts, top-{top_k}, graph us: {medians}", flush=True)
        _write(cells, options.out)  # what was measured before a time limit is kept
    _write(cells, options.out)
    print(json.dumps(ratios(cells)))
    return 0


def _write(cells: Sequence[dict[str, Any]], out: Path) -> None:
    result = {
        "date": now(),
        "provenance": provenance(),
        "placement": {"gpus": GPUS, "nodes": NODES, "redundant": REDUNDANT},
        "layers": LAYERS,
        "ratios": ratios(cells),
        "cells": cells,
    }
    result["entries"] = entries(result)
    write_result(out, result)


if __name__ == "__main__":
    sys.exit(main())
