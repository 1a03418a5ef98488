"""What EPLB costs while it never rearranges, and what DeepEP's auto mode gains, on this host's GPUs.

    python -m bench.gpu.overhead --out FOLDER

The protocol is vLLM's (pull request 24573): random prompts of 1000 tokens, 100 tokens out, no prefix cache, no
redundant experts, no rearrangement; no EPLB, SGLang's EPLB, and ours, as servers side by side that take turns. A group
is one set of servers with one model: DeepSeek-V3's layers in FP8 blocks, as many as fit beside each other (`large`), or
a Qwen3Moe (`small`). `small` also has our EPLB in auto mode, and compares its latencies with those of the two modes it
is made of. Weights are random, so experts are chosen by `--ep-forced-routing balanced` in every arm: random routers
would send all tokens to a few. `--groups cpu` rehearses all of it on the CPU engine; its figures mean nothing.

Where FOLDER has results of the same servers on the same hardware, the new blocks are added to them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.gpu import deepseek_shaped, random_moe
from bench.gpu.earlier import earlier
from bench.gpu.flags import (
    SHARED_MEMORY,
    cpu_flags,
    decode_graphs,
    deepep_flags,
    end_cleanly,
    gpu_gib,
    need_gpus,
    seconds_left,
    timing_options,
    used_gib,
    wait_for,
)
from bench.gpu.overhead_report import LOSSES, REHEARSAL, entries, finish, unfinished, values_of
from bench.gpu.resident import Load, ResidentArm, ResidentServers, incomplete
from bench.gpu.serving_process import ServingProcess
from bench.harness.engine import cpu_environment, own_models_only
from bench.harness.environment import now, provenance
from bench.harness.output_paths import result_folder
from bench.harness.side_by_side import give_turn
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically

NEVER = ("--eplb-rebalance-num-iterations", "100000000", "--expert-distribution-recorder-buffer-size", "1000")
EPLB: dict[str, tuple[str, ...]] = {
    "none": (),
    "upstream": ("--enable-eplb", "--eplb-algorithm", "deepseek", *NEVER),
    "ours": ("--eplb-algorithm", "affinity", *NEVER),
}
MODES = ("normal", "low_latency", "auto")
SMALL = random_moe.MoeSizes(hidden=2048, layers=8, kv_heads=2)  # seven servers fit GPUs of 80 GB
TOKENS = (1000, 100)  # in and out
# Tokens that a rank may dispatch at once in low-latency mode; DeepEP's buffer and the experts' outputs grow with it.
LOW_LATENCY_TOKENS = 128
# Triton's MLA decode holds float32 results [requests, heads, splits, 512], with as many splits as the longest context
# could use: for DeepSeek's 160k tokens 64 MB a request.
CONTEXT = ("--context-length", "1280", "--triton-attention-split-tile-size", "160")  # 8 splits
STAGGER_SECONDS = 10.0  # between two starts of the large model


@dataclass(frozen=True)
class Group:
    """``moe_layers`` of the large model that fit 3 servers on GPUs of 80 and of 141 GB, None for the small model;
    ``modes`` whose overhead is measured, with so many requests, so many of them at once; ``latencies``: whether our
    EPLB is compared in all modes."""

    name: str
    moe_layers: tuple[int, int] | None
    modes: tuple[str, ...]
    requests: int
    concurrency: int
    latencies: bool = False

    def layers_on(self, gpu_gib: float) -> int:
        assert self.moe_layers is not None
        return self.moe_layers[gpu_gib > 120]

    @property
    def arms(self) -> tuple[ResidentArm, ...]:
        wanted = [(eplb, mode) for mode in self.modes for eplb in EPLB]
        if self.latencies:
            wanted += [("ours", mode) for mode in MODES if mode not in self.modes]
        return tuple(ResidentArm(f"{eplb}-{mode}", (*EPLB[eplb], *mode_flags(mode))) for eplb, mode in wanted)

    def loads(self, requests: int) -> dict[Load, list[str]]:
        """Each load and its arms. A throughput of one mode is a load of its own."""
        requests = requests or self.requests
        tokens = (16, 16) if self.name == "cpu" else TOKENS
        found = {
            Load(mode, requests, self.concurrency, *tokens, streams=False): [f"{eplb}-{mode}" for eplb in EPLB]
            for mode in self.modes
        }
        if self.latencies:
            found[Load("latency", 64, 64, *TOKENS)] = [f"ours-{mode}" for mode in MODES]
        return found


GROUPS = (
    Group("large.normal", (3, 5), ("normal",), requests=1000, concurrency=500),
    # Prefill goes through the small low-latency buffer there and is slow. A host's speed drifts by some percent within
    # half a minute, so many short cells in turn tell arms apart better than a few long ones.
    Group("large.low_latency", (2, 4), ("low_latency",), requests=32, concurrency=32),
    Group("small", None, ("normal", "low_latency"), requests=64, concurrency=64, latencies=True),
)


# A rehearsal, not among those that are run unasked.
CPU = Group(REHEARSAL, None, ("cpu",), requests=6, concurrency=2)


def mode_flags(mode: str) -> tuple[str, ...]:
    """Low-latency mode alone also prefills through its buffer, so its chunks are small."""
    if mode == "cpu":
        return ()
    chunk = 2 * LOW_LATENCY_TOKENS if mode == "low_latency" else 8 * TOKENS[0]  # whole prompts
    return ("--deepep-mode", mode, "--chunked-prefill-size", str(chunk))


def server_flags(gpus: int, concurrency: int) -> list[str]:
    """The pool and the batch are a little larger than a rank's share of the requests."""
    share = concurrency // gpus + 8
    flags = [*deepep_flags(gpus), "--load-format", "dummy", *decode_graphs(share), *CONTEXT]
    flags += [*SHARED_MEMORY, "--max-total-tokens", str(share * sum(TOKENS)), "--stream-interval", "1"]
    return [*flags, "--max-running-requests", str(share * gpus), "--ep-forced-routing", "balanced"]


def run_group(group: Group, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one group and write its result beside ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes: Any
    model = folder / "model"
    flags = server_flags(options.gpus, group.concurrency)
    environment = {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": str(LOW_LATENCY_TOKENS)}
    if group == CPU:
        sizes, model, flags = SMALL, random_moe.TOKENIZER, cpu_flags()
        environment = cpu_environment(2) | own_models_only()
    elif group.moe_layers:
        sizes = deepseek_shaped.DeepseekSizes(moe_layers=options.moe_layers or group.layers_on(gpu_gib()))
        deepseek_shaped.write_config(model, sizes)
    else:
        sizes = SMALL
        random_moe.write_config(model, sizes)
    loads = group.loads(options.requests)
    arms_of = {load.name: arms for load, arms in loads.items()}
    path = folder.parent / f"overhead-{group.name}.json"
    identity = {
        "group": group.name,
        "hardware": provenance()["hardware"],
        "model": asdict(sizes),
        "loads": [asdict(load) for load in loads],
        "flags": flags,
        "arms": {arm.name: list(arm.flags) for arm in group.arms},
    }
    before = earlier(path, identity)
    if before.get("void"):
        print(f"{path}: {before['void'][0]}; its blocks do not count and are measured again", flush=True)
        before = {}
    log = folder / "servers" / "client.log"
    servers = ResidentServers(
        group.arms,
        model,
        flags,
        environment,
        log.parent,
        options.port,
        options.start_seconds,
        STAGGER_SECONDS if group.moe_layers else 0.0,
    )
    with ServingProcess(log, {**os.environ, **environment}) as client, servers:
        ready, memory = servers.seconds_to_ready, used_gib()
        print(f"{group.name}: ready {ready} failed {servers.failed or 'none'}, GPUs hold {memory} GiB", flush=True)
        if servers.failed:  # a comparison needs all arms, and device time is dear
            raise RuntimeError("; ".join(f"{name} did not start: {why}" for name, why in servers.failed.items()))
        if options.hold:
            give_turn(servers.servers, "")  # not beside what is measured before
        wait_for(options.hold)
        began = time.monotonic()
        blocks = range(first := before.get("blocks", 0), first + options.blocks)
        rows = servers.run(list(loads), options.blocks, seconds_left(options), 0.5, arms_of, client, first)
        took = round(time.monotonic() - began, 1)
        rebalances = {name: len(server.summary().rebalances) for name, server in servers.servers.items()}
        sitting = {
            "date": now(),
            "commit": provenance()["commit"],
            "blocks": [first, first + options.blocks],
            "seconds_to_ready": ready,
            "gpu_gib_used": {"ready": memory, "after": used_gib()},
            "seconds_of_load": took,
            "rebalances": rebalances,
        }
        void = [*incomplete(rows, list(loads)), *(f"{name} rebalanced" for name, count in rebalances.items() if count)]
        result = {
            **identity,
            "date": sitting["date"],
            "blocks": first + options.blocks,
            "sittings": [*before.get("sittings", []), sitting],
            "void": void,
            "unfinished": [*before.get("unfinished", []), *unfinished(rows, loads, blocks)],
            "values": {load.name: values_of(rows, load, arms, before) for load, arms in loads.items()},
        }
        result = finish(result)
        # Before the servers are stopped, which takes a while, and time may be up.
        write_atomically(path, json.dumps(result, indent=1).encode())
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.overhead", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=result_folder, required=True)
    parser.add_argument("--groups", default=",".join(group.name for group in GROUPS))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--requests", type=int, default=0, help="prompts of a load (default: as in vLLM's protocol)")
    parser.add_argument("--moe-layers", type=int, default=0, help="of the large model (default: what fits these GPUs)")
    timing_options(parser, "loads in one group, once its servers are ready")
    parser.add_argument("--start-seconds", type=float, default=400, help="until servers must be ready")
    parser.add_argument("--port", type=int, default=31700)
    options = parser.parse_args(arguments)
    known = {group.name: group for group in (*GROUPS, CPU)}
    wanted = options.groups.split(",")
    for name in wanted:
        if name not in known:
            print(f"error: --groups {name}: unknown; known are {', '.join(known)}", file=sys.stderr)
            return 2
    failed = False
    end_cleanly()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        try:
            if known[name] != CPU:
                need_gpus("bench.gpu.overhead", options.gpus)
            result = run_group(known[name], options.out / name, options)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Exception as error:
            print(f"{name}: failed: {error}", flush=True)
            failed = True
            continue
        failed = failed or bool(result["void"])
        shown = {key: result.get(key) for key in ("void", "unfinished", *LOSSES, "ratios")}
        print(f"{name}: {json.dumps(shown)}", flush=True)
    source = provenance()
    results = [json.loads(path.read_text()) for path in sorted(options.out.glob("overhead-*.json"))]
    summary = {"provenance": source, "groups": results, "entries": entries(results, source)}
    write_atomically(options.out / "overhead.json", json.dumps(summary, indent=1).encode())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
