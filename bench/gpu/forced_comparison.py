"""Prefill and decode throughput with recorded routing, perfect balance, and the placements of EPLB and affinity.

    python -m bench.gpu.forced_comparison --out FOLDER

LightLLM's comparison (pull request 962) on a model with random weights, on all GPUs of this host with DeepEP. Routing
is replayed from the small trained model's test trace, so that skew and co-activation are real; `balanced` is the upper
bound of balancing, and `balanced:spread` against `balanced:local` is what fan-out costs at the same balance. The
placements of EPLB and affinity are planned from the plan trace and loaded as static maps, so that no rebalance falls
into a measurement. Each arm is one server; it can be stopped and continued, and finished arms are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.engine import ROOT, Engine
from bench.environment import now, provenance
from bench.gpu.random_moe import MoeSizes, build
from bench.process import last_error, start_group, stop_group
from bench.server import Server
from sglang_eplb_affinity.expert_map import write_atomically

DATA = ROOT / "bench" / "data"
PLAN, TEST = DATA / "tiny_moe_plan.npz", DATA / "tiny_moe_test.npz"
REDUNDANT_PER_GPU = 4


@dataclass(frozen=True)
class ForcedArm:
    name: str
    forced: str
    algorithm: str | None = None  # whose placement, planned from the plan trace

    def flags(self, folder: Path, gpus: int) -> list[str]:
        flags = ["--ep-forced-routing", self.forced]
        if self.algorithm:
            flags += ["--init-expert-location", str(folder / f"map-{self.algorithm}.json")]
            flags += ["--ep-num-redundant-experts", str(REDUNDANT_PER_GPU * gpus), "--ep-dispatch-algorithm", "static"]
        return flags


REPLAY = f"replay:{TEST}"
ARMS = (
    ForcedArm("recorded", REPLAY),
    ForcedArm("balanced", "balanced"),
    ForcedArm("eplb", REPLAY, "deepseek"),
    ForcedArm("affinity", REPLAY, "affinity"),
    ForcedArm("spread", "balanced:spread"),
    ForcedArm("local", "balanced:local"),
)


@dataclass(frozen=True)
class Load:
    """One closed-loop load; ``metric`` is bench_serving's throughput that counts."""

    name: str
    requests: int
    concurrency: int
    input_tokens: int
    output_tokens: int
    metric: str

    def arguments(self, model: Path, port: int, out: Path) -> list[str]:
        arguments = ["--backend", "sglang", "--host", "127.0.0.1", "--port", str(port), "--model", str(model)]
        arguments += ["--dataset-name", "random-ids", "--num-prompts", str(self.requests)]
        arguments += ["--random-input-len", str(self.input_tokens), "--random-output-len", str(self.output_tokens)]
        arguments += ["--random-range-ratio", "1.0", "--max-concurrency", str(self.concurrency)]
        return [*arguments, "--warmup-requests", "0", "--output-file", str(out)]


def loads(gpus: int) -> tuple[Load, Load]:
    return (
        # Long enough that the start and the end of a load do not count: with a second of decode the repeats of one
        # server differed by a factor of two.
        Load("prefill", 1024 * gpus, 128 * gpus, 2048, 1, "input_throughput"),
        Load("decode", 256 * gpus, 128 * gpus, 16, 1536, "output_throughput"),
    )


def server_flags(gpus: int, mode: str) -> list[str]:
    flags = ["--tp", str(gpus), "--ep", str(gpus), "--dp", str(gpus), "--enable-dp-attention"]
    flags += ["--moe-a2a-backend", "deepep", "--deepep-mode", mode, "--moe-runner-backend", "deep_gemm"]
    flags += ["--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none"]
    flags += ["--disable-custom-all-reduce", "--enforce-disable-flashinfer-allreduce-fusion"]
    flags += ["--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", "128", "--mem-fraction-static", "0.5"]
    flags += ["--chunked-prefill-size", str(8192 * gpus), "--max-running-requests", str(256 * gpus)]
    return [*flags, "--disable-radix-cache", "--enable-expert-affinity-recorder", "--expert-load-log-passes", "200"]


def write_maps(folder: Path, gpus: int) -> None:
    """The placements of EPLB and affinity for ``gpus`` GPUs, from the plan trace."""
    if (folder / "map-affinity.json").is_file():
        return
    from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan
    from sglang_eplb_affinity.routing import RoutingTrace, RoutingWindow
    from sglang_eplb_affinity.topology import Topology

    window = RoutingWindow.from_trace(RoutingTrace.load(PLAN), 16384)
    topology, slots = Topology(gpus), window.num_experts + REDUNDANT_PER_GPU * gpus
    eplb_placement(window.counts, topology, slots).save(folder / "map-deepseek.json")
    config = PlannerConfig(effort="thorough", dispatch="static")
    plan(window, topology, slots, config).expert_map.save(folder / "map-affinity.json")


def measure_arm(
    arm: ForcedArm, folder: Path, model: Path, gpus: int, mode: str, repeats: int, port: int
) -> dict[str, Any]:
    """Start the server of one arm and load it; the first repeat warms up and is kept apart."""
    flags = [*server_flags(gpus, mode), *arm.flags(folder, gpus)]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    environment = {**os.environ, "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256"}
    engine = Engine(str(model), environment)
    log = folder / f"server-{arm.name}.log"
    started = time.monotonic()
    with Server(command, engine, log, port, 400) as server:
        ready = time.monotonic() - started
        results = _load(folder / arm.name, model, gpus, repeats, port, environment, log)
        text = server.log.read_text(errors="replace")
    load_lines = [line.split("load ", 1)[1] for line in text.splitlines() if "[eplb-affinity] load " in line]
    return {
        "arm": arm.name,
        "flags": [flag.replace(str(ROOT) + "/", "").replace(str(folder) + "/", "") for flag in flags],
        "deepep_mode": mode,
        "date": now(),
        "seconds_to_ready": round(ready, 1),
        "throughput": {name: values[1:] for name, values in results.items()},
        "warm_up": {name: values[0] for name, values in results.items()},
        "last_load_line": json.loads(load_lines[-1]) if load_lines else None,
    }


def _load(
    folder: Path, model: Path, gpus: int, repeats: int, port: int, environment: dict[str, str], log: Path
) -> dict[str, list[float]]:
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.jsonl"):
        stale.unlink()
    outputs = {load.name: folder / f"{load.name}.jsonl" for load in loads(gpus)}
    commands = [load.arguments(model, port, outputs[load.name]) for _ in range(repeats + 1) for load in loads(gpus)]
    (folder / "commands.json").write_text(json.dumps(commands))
    client_log = folder / "client.log"
    client = start_group(
        [sys.executable, "-m", "bench.gpu.serving_loop", str(folder / "commands.json")], client_log, environment
    )
    try:
        client.wait(timeout=300)
    finally:
        stop_group(client)
    if client.returncode:
        raise RuntimeError(f"load failed: {last_error(client_log, 'no log')}; server: {last_error(log, 'no log')}")
    results = {}
    for load in loads(gpus):
        rows = [json.loads(line) for line in outputs[load.name].read_text().splitlines()]
        short = [row["completed"] for row in rows if row["completed"] != load.requests]
        if len(rows) != repeats + 1 or short:
            raise RuntimeError(f"{load.name}: {len(rows)} results, {short} requests completed of {load.requests}")
        results[load.name] = [round(float(row[load.metric]), 1) for row in rows]
    return results


def gain(of: list[float], over: list[float]) -> dict[str, float]:
    """Percent more throughput with a 95 % interval of Welch's t on log throughput over the repeats of one server."""
    from scipy import stats

    a, b = np.log(of), np.log(over)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    centre = float(a.mean() - b.mean())
    return {
        name: round(100 * (math.exp(value) - 1), 2)
        for name, value in (("value", centre), ("lower", float(interval.low)), ("upper", float(interval.high)))
    }


def summarize(folder: Path) -> dict[str, Any]:
    """Gains over recorded routing without EPLB, from the arms measured so far."""
    arms = {path.stem.removeprefix("arm-"): json.loads(path.read_text()) for path in sorted(folder.glob("arm-*.json"))}
    result: dict[str, Any] = {"arms": arms, "gain_pct_over_recorded": {}}
    for name, arm in arms.items():
        if name != "recorded" and "recorded" in arms:
            result["gain_pct_over_recorded"][name] = {
                load: gain(values, arms["recorded"]["throughput"][load]) for load, values in arm["throughput"].items()
            }
    return result


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.forced_comparison", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("/tmp/random-moe"), help="built there if it is not")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--mode", default="auto", choices=["auto", "normal", "low_latency"])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3600, help="no new arm starts after so many seconds")
    parser.add_argument("--arms", default=",".join(arm.name for arm in ARMS))
    parser.add_argument("--port", type=int, default=31700)
    options = parser.parse_args()
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    build(options.model, MoeSizes(), "cuda" if torch.cuda.is_available() else "cpu")
    write_maps(options.out, options.gpus)
    print(f"model and maps ready after {time.monotonic() - began:.0f} s", flush=True)
    failed = 0
    for number, arm in enumerate(arm for arm in ARMS if arm.name in options.arms.split(",")):
        path = options.out / f"arm-{arm.name}.json"
        if path.is_file():
            continue
        if time.monotonic() - began > options.seconds:
            print(f"{arm.name}: not started, the time is up", flush=True)
            continue
        try:
            result = measure_arm(
                arm, options.out, options.model, options.gpus, options.mode, options.repeats, options.port + 20 * number
            )
            write_atomically(path, json.dumps(result, indent=1).encode())
            print(f"{arm.name}: {result['throughput']} ready in {result['seconds_to_ready']} s", flush=True)
        except Exception as error:
            failed += 1
            print(f"{arm.name}: failed: {error}", flush=True)
    summary = {"provenance": provenance(), **summarize(options.out)}
    write_atomically(options.out / "result.json", json.dumps(summary, indent=1).encode())
    print(json.dumps(summary["gain_pct_over_recorded"], indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
