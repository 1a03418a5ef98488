"""Prefill and decode throughput with recorded routing, perfect balance, and the placements of EPLB and affinity.

    python -m bench.gpu.forced_comparison --out FOLDER

LightLLM's comparison (pull request 962) on a model with random weights, on all GPUs of this host with DeepEP. Routing
is replayed from the small trained model's test trace, so that skew and co-activation are real; `balanced` is the upper
bound of balancing, and `balanced:spread` against `balanced:local` is what fan-out costs at the same balance. The
placements of EPLB and affinity are planned from the plan trace and loaded as static maps, so that no rebalance falls
into a measurement. All arms run side by side on the same GPUs and take turns; a block is every load on every arm.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.figures.stats import ratio_by_block
from bench.gpu.flags import deepep_flags
from bench.gpu.random_moe import MoeSizes, write_config
from bench.gpu.resident import Load, ResidentArm, ResidentServers, by_block, incomplete
from bench.harness.engine import ROOT
from bench.harness.environment import now, provenance
from bench.harness.output_paths import result_folder
from sglang_eplb_affinity.domain.files import write_atomically

DATA = ROOT / "bench" / "data"
PLAN, TEST = DATA / "tiny_moe_plan.npz", DATA / "tiny_moe_test.npz"
REDUNDANT_PER_GPU = 4
SIZES = MoeSizes(hidden=4096, expert_width=2048, heads=32, kv_heads=4)
ENVIRONMENT = {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256"}
METRIC = {"prefill": "input_throughput", "decode": "output_throughput"}


@dataclass(frozen=True)
class ForcedArm:
    name: str
    forced: str
    algorithm: str | None = None  # whose placement, planned from the plan trace

    def resident(self, folder: Path, gpus: int) -> ResidentArm:
        flags = ["--ep-forced-routing", self.forced]
        if self.algorithm:
            flags += ["--init-expert-location", str(folder / f"map-{self.algorithm}.json")]
            flags += ["--ep-num-redundant-experts", str(REDUNDANT_PER_GPU * gpus), "--ep-dispatch-algorithm", "static"]
        return ResidentArm(self.name, tuple(flags))


REPLAY = f"replay:{TEST.relative_to(ROOT)}"  # servers run in the root of the checkout
ARMS = (
    ForcedArm("recorded", REPLAY),
    ForcedArm("balanced", "balanced"),
    ForcedArm("eplb", REPLAY, "deepseek"),
    ForcedArm("affinity", REPLAY, "affinity"),
    ForcedArm("spread", "balanced:spread"),
    ForcedArm("local", "balanced:local"),
)


def loads(gpus: int) -> tuple[Load, Load]:
    """Seconds each, and without streams, so that the GPUs are what is measured."""
    return (
        Load("prefill", 256 * gpus, 128 * gpus, 2048, 1, streams=False),
        Load("decode", 128 * gpus, 128 * gpus, 16, 1024, streams=False),
    )


def server_flags(gpus: int, mode: str) -> list[str]:
    flags = [*deepep_flags(gpus), "--deepep-mode", mode, "--load-format", "dummy", "--mem-fraction-static", "0.85"]
    flags += ["--cuda-graph-max-bs-decode", "128", "--max-running-requests", str(128 * gpus)]
    flags += ["--max-total-tokens", "300000", "--chunked-prefill-size", str(8192 * gpus), "--stream-interval", "64"]
    return [*flags, "--enable-expert-affinity-recorder", "--expert-load-log-passes", "200"]


def write_maps(folder: Path, gpus: int) -> None:
    """The placements of EPLB and affinity for ``gpus`` GPUs, from the plan trace."""
    if (folder / "map-affinity.json").is_file():
        return
    from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
    from sglang_eplb_affinity.domain.topology import Topology
    from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan

    window = RoutingWindow.from_trace(RoutingTrace.load(PLAN), 16384)
    topology, slots = Topology(gpus), window.num_experts + REDUNDANT_PER_GPU * gpus
    eplb_placement(window.counts, topology, slots).save(folder / "map-deepseek.json")
    config = PlannerConfig(effort="thorough", dispatch="static")
    plan(window, topology, slots, config).expert_map.save(folder / "map-affinity.json")


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Serve all arms, load them block by block; the rows and what each server logged about its load."""
    wanted = options.arms.split(",")
    arms = [arm.resident(folder, options.gpus) for arm in ARMS if arm.name in wanted]
    flags = server_flags(options.gpus, options.mode)
    with ResidentServers(arms, folder / "model", flags, ENVIRONMENT, folder / "servers", options.port) as servers:
        print(f"ready after {servers.seconds_to_ready} s; failed: {servers.failed or 'none'}", flush=True)
        rows = servers.run(loads(options.gpus), options.blocks, options.seconds)
        lines = {name: _last_load_line(server.log) for name, server in servers.servers.items()}
    return {
        "date": now(),
        "command": "python -m bench.gpu.forced_comparison --out FOLDER",
        "deepep_mode": options.mode,
        "gpus": options.gpus,
        "model": asdict(SIZES),
        "loads": [asdict(load) for load in loads(options.gpus)],
        "flags": flags,
        "failed_servers": servers.failed,
        "void": incomplete(rows, loads(options.gpus)),
        "throughput": {
            arm.name: {load: by_block(rows, arm.name, load, metric) for load, metric in METRIC.items()} for arm in arms
        },
        "last_load_line": lines,
    }


def _last_load_line(log: Path) -> Any:
    marker = "[eplb-affinity] load "
    lines = [line.split(marker, 1)[1] for line in log.read_text(errors="replace").splitlines() if marker in line]
    return json.loads(lines[-1]) if lines else None


def gains(throughput: dict[str, dict[str, dict[int, float]]], over: str = "recorded") -> dict[str, dict[str, Any]]:
    """Percent more throughput than arm ``over``, paired by block: value, lower and upper of the 95 % interval."""
    found: dict[str, dict[str, Any]] = {}
    for arm, of_load in throughput.items():
        for load, values in of_load.items():
            base = throughput.get(over, {}).get(load, {})
            if arm != over and set(values) & set(base):
                found.setdefault(arm, {})[load] = ratio_by_block(values, base).gain_pct()
    return found


def entries(result: dict[str, Any], source: dict[str, Any]) -> list[dict[str, Any]]:
    """Summary entries of what fake balance gains over recorded routing."""
    gain = result["gain_pct_over_recorded"].get("balanced", {})
    return [
        {
            "name": f"forced.balanced.{load}_gain_pct",
            "value": gain[load]["value"],
            "lower": gain[load]["lower"],
            "upper": gain[load]["upper"],
            "unit": "% more tokens/s than recorded routing",
            "kind": "measured",
            "hardware": source["hardware"],
            "versions": source["versions"],
            "commit": source["commit"],
            "date": result["date"],
            "command": result["command"],
        }
        for load in METRIC
        if gain.get(load, {}).get("blocks", 0) > 1
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.forced_comparison", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=result_folder, required=True)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--mode", default="auto", choices=["auto", "normal", "low_latency"])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3600, help="no load goes on after so many seconds")
    parser.add_argument("--arms", default=",".join(arm.name for arm in ARMS))
    parser.add_argument("--port", type=int, default=31700)
    options = parser.parse_args(arguments)
    if options.gpus < 2:
        print(f"error: --gpus: {options.gpus}, but expert parallelism needs at least 2", file=sys.stderr)
        return 2
    folder: Path = options.out
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder / "model", SIZES)
    write_maps(folder, options.gpus)
    print(f"maps ready after {time.monotonic() - began:.0f} s", flush=True)
    result = run(options, folder)
    result["gain_pct_over_recorded"] = gains(result["throughput"])
    source = provenance()
    result = {"provenance": source, **result, "entries": entries(result, source)}
    write_atomically(folder / "result.json", json.dumps(result, indent=1).encode())
    print(json.dumps({"void": result["void"], "gains": result["gain_pct_over_recorded"]}, indent=1))
    return 1 if result["failed_servers"] or result["void"] else 0


if __name__ == "__main__":
    sys.exit(main())
