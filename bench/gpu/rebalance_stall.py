"""What rebalancing costs the requests that are being served: none, SGLang's own, and --eplb-async.

    python -m bench.gpu.rebalance_stall --out FOLDER            (all GPUs of this host, DeepEP)
    python -m bench.gpu.rebalance_stall --out FOLDER --cpu      (a smoke run on the CPU engine: its times mean nothing)

All arms run side by side on the same GPUs and take turns, in every block each. N requests decode together; inter-token
latency is measured on some of them that stream (all of them streaming would measure the client). Expert
weights are random, routing is replayed from the small trained model's test trace: skew and co-activation are real.
Rebalances come every 100 passes, far more often than in production, and move layers however small the gain is.

Where FOLDER has results of the same servers on the same hardware, the new blocks are added to them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.earlier import earlier
from bench.gpu.flags import (
    SHARED_MEMORY,
    cpu_flags,
    decode_graphs,
    deepep_flags,
    end_cleanly,
    host_options,
    hosts_of,
    seconds_left,
    timing_options,
    wait_for,
)
from bench.gpu.random_moe import TOKENIZER, MoeSizes, write_config
from bench.gpu.resident import Load, ResidentArm, ResidentServers
from bench.gpu.serving_process import ServingProcess
from bench.gpu.stall_report import entries, ratios, rounds, settled, spread, verification
from bench.harness.engine import cpu_environment, own_models_only
from bench.harness.environment import now, provenance
from bench.harness.hosts import OtherHosts
from bench.harness.output_paths import result_folder
from bench.harness.schedule import williams_rows
from bench.harness.side_by_side import give_turn
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.rebalance import verify

SIZES = MoeSizes(layers=6, hidden=4096, expert_width=1024, heads=32, kv_heads=2)  # six servers fit GPUs of 80 GB
REDUNDANT_PER_GPU = 4
REPLAY = "replay:bench/data/tiny_moe_test.npz"  # servers run in the root of the checkout
INTERVAL = 100
NAMES = ("none", "sync", "async")
VERIFIED = "verified"
Cells = list[dict[str, Any]]
# Tokens that a rank prefills, and in low-latency mode dispatches, at once.
CHUNK = 320


@dataclass(frozen=True)
class StallLoad:
    """``concurrency`` requests at once, ``streams`` of them streaming and measured; the others, the background, begin a
    second earlier and are longer. Nobody is admitted in between, so a pass that takes long is a stall."""

    concurrency: int
    streams: int
    output_tokens: int
    background_tokens: int
    input_tokens: int = 16

    @property
    def name(self) -> str:
        return f"c{self.concurrency}"

    def measured(self) -> Load:
        return Load(self.name, self.streams, self.streams, self.input_tokens, self.output_tokens)

    def background(self) -> Load:
        rest = self.concurrency - self.streams
        return Load(self.name, rest, rest, self.input_tokens, self.background_tokens, streams=False)

    def shortened(self) -> StallLoad:
        return replace(self, output_tokens=self.output_tokens // 4, background_tokens=self.background_tokens // 2)


@dataclass(frozen=True)
class Setting:
    """``loads`` of each mode (DeepEP's, or ``cpu``)."""

    loads: Mapping[str, tuple[StallLoad, ...]]
    ranks: int
    redundant: int
    interval: int

    def arms(self) -> list[ResidentArm]:
        return [self._arm(mode, name) for mode in self.loads for name in NAMES]

    def verified(self) -> ResidentArm:
        """Loaded but not measured: after each round it proves that every slot holds what the map says."""
        arm = self._arm(list(self.loads)[-1], "async")
        return ResidentArm(VERIFIED, arm.flags, {verify.ENVIRONMENT: "1"})

    def _arm(self, mode: str, name: str) -> ResidentArm:
        """Without rebalancing the slots are as many, and replicas are chosen by the same rule: with redundant experts
        there are more weights to read, which is not what rebalancing costs."""
        flags = [] if mode == "cpu" else ["--deepep-mode", mode]
        flags += ["--ep-num-redundant-experts", str(self.redundant)]
        flags += ["--ep-dispatch-algorithm", "dynamic" if mode == "cpu" else "static"]
        if name != "none":
            flags += ["--enable-eplb", "--eplb-rebalance-num-iterations", str(self.interval)]
            flags += ["--expert-distribution-recorder-buffer-size", str(self.interval)]
            flags += ["--eplb-algorithm", "deepseek" if name == "sync" else "affinity"]
        if name == "async":
            # Paused while others have their turn, a round lasts as long as they do.
            flags += ["--eplb-async", "--eplb-min-gain", "0", "--eplb-async-phase-limit", "3600"]
        return ResidentArm(f"{mode}-{name}", tuple(flags))


def gpu_setting(gpus: int, modes: Sequence[str]) -> Setting:
    """Normal mode decodes without CUDA graphs, several times slower: its requests are shorter. The background covers
    the second or two until the streams run, in passes of each mode and size."""
    normal = (StallLoad(128, 32, 200, 270), StallLoad(512, 32, 200, 270))
    graphs = (StallLoad(128, 32, 400, 700), StallLoad(512, 32, 400, 600))
    loads = {mode: normal if mode == "normal" else graphs for mode in modes}
    return Setting(loads, gpus, REDUNDANT_PER_GPU * gpus, INTERVAL)


CPU_SETTING = Setting({"cpu": (StallLoad(4, 2, 40, 80),)}, 2, 4, 20)


def gpu_flags(gpus: int) -> list[str]:
    flags = [*deepep_flags(gpus), "--load-format", "dummy", *decode_graphs(256)]
    flags += [*SHARED_MEMORY, "--max-total-tokens", "190000"]
    flags += ["--max-running-requests", str(320 * gpus), "--chunked-prefill-size", str(CHUNK * gpus)]
    return [*flags, "--ep-forced-routing", REPLAY]


def order_of(setting: Setting, blocks: range) -> list[tuple[int, StallLoad, str]]:
    """(block, load, arm), arms in Williams order within a block and mode; block -1 warms up, briefly."""
    rows = williams_rows(len(NAMES))
    found = []
    for mode, loads in setting.loads.items():
        found += [(-1, load.shortened(), f"{mode}-{name}") for load in loads for name in NAMES]
    found += [(-1, load.shortened(), VERIFIED) for load in loads]
    for block in blocks:
        for mode, loads in setting.loads.items():
            for load in loads if block % 2 == 0 else loads[::-1]:
                found += [(block, load, f"{mode}-{NAMES[i]}") for i in rows[block % len(rows)]]
    return found


def run(
    setting: Setting,
    options: argparse.Namespace,
    model: Path,
    flags: list[str],
    environment: dict[str, str],
    save: Callable[[Cells, dict[str, str], dict[str, str]], None],
    cells: Cells,
    hosts: OtherHosts,
) -> None:
    """Measure everything; ``save`` gets the cells, the logs and the servers that failed, after every block. ``cells``:
    those of earlier sittings, to which this one adds."""
    folder: Path = options.out
    first = 1 + max((cell["block"] for cell in cells), default=-1)
    everything = {**os.environ, **environment}
    arms = [*setting.arms(), setting.verified()] if options.verify else setting.arms()
    with (
        ServingProcess(folder / "measured.log", everything) as measured,
        ServingProcess(folder / "background.log", everything) as background,
        ResidentServers(arms, model, flags, environment, folder / "servers", options.port, hosts=hosts) as servers,
    ):
        print(f"ready {servers.seconds_to_ready} failed: {servers.failed or 'none'}", flush=True)
        if options.hold:
            give_turn(servers.servers, "")  # not beside what is measured before
        wait_for(options.hold)
        deadline = time.monotonic() + seconds_left(options)
        measured.wait_until_ready(300)
        background.wait_until_ready(300)
        previous = -1
        for number, (block, load, arm) in enumerate(order_of(setting, range(first, first + options.blocks))):
            left = deadline - time.monotonic()
            if arm not in servers.servers or left < 5:
                continue
            if block != previous:
                save(cells, servers.logs(), servers.failed)
                previous = block
            give_turn(servers.servers, arm)
            try:
                cell = _cell(load, servers.servers[arm].port, model, folder, number, block, measured, background, left)
            except RuntimeError as error:
                print(f"{arm} {load.name} block {block}: {error}", flush=True)
                break
            cells.append({"arm": arm, "load": load.name, "block": block, **cell})
            print(json.dumps(cells[-1]), flush=True)
        save(cells, servers.logs(), servers.failed)


def _cell(
    load: StallLoad, port: int, model: Path, folder: Path, number: int, block: int,
    measured: ServingProcess, background: ServingProcess, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """One arm under one load: latencies of the streams, and tokens/s of all while they run."""
    outputs = [folder / f"cell-{number:03}-{kind}.jsonl" for kind in ("measured", "background")]
    for path in outputs:
        path.unlink(missing_ok=True)
    seed = 1000 + 2 * block
    background.begin(load.background().arguments(model, port, seed, outputs[1]))
    time.sleep(1.0)
    measured.begin([*load.measured().arguments(model, port, seed + 1, outputs[0]), "--output-details"])
    measured.wait(seconds)
    background.wait(seconds)
    of_streams, of_rest = (json.loads(path.read_text().splitlines()[-1]) for path in outputs)
    for path in outputs:
        path.unlink()
    streams = [settled(1000 * np.asarray(values)) for values in of_streams["itls"]]
    return {
        "completed": [of_streams["completed"], of_rest["completed"]],
        "itl_ms": {name: round(float(value), 3) for name, value in spread(np.concatenate(streams)).items()},
        # All requests get a token a pass, so the streams' pace is that of all of them.
        "decode_throughput": round(float(load.concurrency * np.mean([1000 / itl.mean() for itl in streams])), 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    import torch

    name = "python -m bench.gpu.rebalance_stall"
    parser = argparse.ArgumentParser(prog=name, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=result_folder, required=True)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--modes", default="normal,low_latency", help="of DeepEP")
    parser.add_argument("--verify", action="store_true", help="one more server, which proves the weights of every slot")
    parser.add_argument("--blocks", type=int, default=4)
    host_options(parser)
    timing_options(parser, "loads, once the servers are ready")
    parser.add_argument("--port", type=int, default=31700)
    options = parser.parse_args(arguments)
    if not options.cpu and options.gpus < 2:
        print(f"error: --gpus: {options.gpus}, but expert parallelism needs at least 2", file=sys.stderr)
        return 2
    try:
        hosts = hosts_of(options, 2 if options.cpu else options.gpus)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    end_cleanly()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.cpu:
        setting, model, flags, environment = CPU_SETTING, TOKENIZER, cpu_flags(), cpu_environment(2) | own_models_only()
    else:
        setting, flags = gpu_setting(options.gpus, options.modes.split(",")), gpu_flags(options.gpus)
        model, environment = options.out / "model", {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": str(CHUNK)}
        write_config(model, SIZES)
    source, command = provenance(), f"{name} --out FOLDER" + (" --cpu" if options.cpu else "") + str(hosts)
    identity = {
        "command": command,
        "hardware": source["hardware"],
        "model": asdict(SIZES),
        "flags": flags,
        "arms": {arm.name: list(arm.flags) for arm in setting.arms()},
        "loads": {mode: [asdict(load) for load in loads] for mode, loads in setting.loads.items()},
    }
    path = options.out / "result.json"
    try:
        before = earlier(path, identity)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {**identity, "sittings": [*before.get("sittings", []), {}]}

    def save(cells: Cells, logs: dict[str, str], failed: dict[str, str]) -> None:
        sitting = {
            "date": now(),
            "commit": source["commit"],
            "failed_servers": failed,
            "rounds": {arm: rounds(log) for arm, log in logs.items() if not arm.endswith("-none")},
            "verified": verification(logs.get(VERIFIED, "")),
        }
        result["sittings"][-1] = sitting
        result.update(sitting, provenance=source, ratios_to_no_rebalancing=ratios(cells), cells=cells)
        result["entries"] = [] if options.cpu else entries(result)
        write_atomically(path, json.dumps(result, indent=1, default=float).encode())

    run(
        setting,
        options,
        model,
        flags,
        environment,
        save,
        [c for c in before.get("cells", []) if c["block"] >= 0],
        hosts,
    )
    shown = {key: result[key] for key in ("ratios_to_no_rebalancing", "rounds", "verified")}
    print(json.dumps(shown, indent=1, default=float))
    return 1 if result["failed_servers"] or not result["cells"] or result["verified"]["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
