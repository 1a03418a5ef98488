"""Rebalances on GPUs change where experts are and nothing else: logits, over dozens of rebalances.

    python -m bench.gpu.rebalance_check --out FILE.json

Two servers, one after the other: SGLang's own rebalances in chunks of layers, and `--eplb-async`, which also proves
the weights of every slot after each round. Both have random weights, DeepEP's auto mode, redundant experts,
`--ep-dispatch-algorithm cover` and decode CUDA graphs. The same prompts are asked again and again. Two askings under
one placement, one prompt at a time and all at once, show the noise: other batch sizes run other GEMM tiles. Askings
under different placements may not differ by more. A lost or misplaced expert would, since the prompts use all of them.
`--cpu` rehearses it on the CPU engine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench.engine import cpu_environment
from bench.environment import now, provenance
from bench.gpu.flags import (
    SHARED_MEMORY,
    cpu_flags,
    deepep_flags,
    end_cleanly,
    need_gpus,
    seconds_left,
    timing_options,
    wait_for,
)
from bench.gpu.random_moe import MoeSizes, build
from bench.gpu.resident import ResidentArm, ResidentServers
from bench.gpu.stall_report import rounds, verification
from bench.server import Server, give_turn
from sglang_eplb_affinity.errors import InputError
from sglang_eplb_affinity.files import write_atomically
from sglang_eplb_affinity.rebalance import verify

SIZES = MoeSizes(layers=4)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 160, 4
# Passes between rebalances: twice what two askings take, so that every other pair is of one placement.
ITERATIONS = 80
INTERVAL = ("--eplb-rebalance-num-iterations", str(ITERATIONS))
CPU_SIZES = MoeSizes(layers=3, hidden=64, expert_width=32, heads=2, kv_heads=1, head_dim=32)
ASYNC = ("--eplb-async", "--eplb-async-min-gain", "0", "--eplb-async-phase-limit", "3600")
ARMS = (
    ResidentArm("sync", ("--eplb-rebalance-layers-per-chunk", "2")),
    ResidentArm("async", ASYNC, {verify.ENVIRONMENT: "1"}),
)


def server_flags(gpus: int, cpu: bool = False) -> list[str]:
    """The CPU engine has no DeepEP; replicas are chosen there as it chooses by default."""
    if cpu:
        return [*cpu_flags(), "--eplb-algorithm", "affinity", "--ep-num-redundant-experts", "8", *INTERVAL]
    flags = [*deepep_flags(gpus), "--deepep-mode", "auto", "--cuda-graph-max-bs-decode", "32"]
    flags += [*SHARED_MEMORY, "--max-total-tokens", "50000", "--chunked-prefill-size", "4096"]
    flags += ["--eplb-algorithm", "affinity", "--ep-num-redundant-experts", "8", "--ep-dispatch-algorithm", "cover"]
    return [*flags, *INTERVAL]


class Asker:
    def __init__(self, server: Server) -> None:
        self._server = server
        random = np.random.default_rng(0)
        self._prompts = random.integers(10, SIZES.vocabulary, (PROMPTS, PROMPT_TOKENS)).tolist()

    @property
    def rounds(self) -> int:
        """Rebalances so far that moved experts."""
        return self._server.summary().moved

    def _ask(self, ids: list[int], new_tokens: int, logprobs: bool) -> Any:
        body: dict[str, Any] = {"input_ids": ids, "return_logprob": logprobs, "logprob_start_len": 0}
        body["sampling_params"] = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self._server.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.loads(response.read())["meta_info"]

    def logprobs(self, at_once: bool) -> tuple[np.ndarray, list[list[tuple[float, int]]]]:
        """(float64 [prompts, tokens - 1] of the prompts' tokens, (logprob, id) of each new token)."""
        with ThreadPoolExecutor(PROMPTS if at_once else 1) as pool:
            found = list(pool.map(lambda ids: self._ask(ids, NEW_TOKENS, True), self._prompts))
        prefill = [[entry[0] for entry in meta["input_token_logprobs"][1:]] for meta in found]
        decode = [[(entry[0], entry[1]) for entry in meta["output_token_logprobs"]] for meta in found]
        return np.array(prefill, dtype=float), decode

    def traffic(self, seed: int) -> None:
        """Prompts of one part of the vocabulary, so that placements differ from round to round."""
        random = np.random.default_rng(seed)
        low = 10 + seed * 397 % (SIZES.vocabulary - 600)
        prompts = random.integers(low, low + 500, (24, 64)).tolist()
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda ids: self._ask(ids, ITERATIONS, False), prompts))


def differences(a: Any, b: Any) -> dict[str, list[float]]:
    """Absolute differences of log probabilities; of decoded tokens up to the first that differs."""
    decode = []
    for left, right in zip(a[1], b[1], strict=True):
        for (p, i), (q, j) in zip(left, right, strict=True):
            if i != j:
                break
            decode.append(abs(p - q))
    return {"prefill": np.abs(a[0] - b[0]).ravel().tolist(), "decode": decode}


def summarize(parts: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    out = {}
    for name in ("prefill", "decode"):
        values = np.array([value for part in parts for value in part[name]])
        out[name] = {
            "values": len(values),
            "mean": float(values.mean()),
            "p99": float(np.percentile(values, 99)),
            "max": float(values.max()),
        }
    return out


def check(server: Server, rebalances: int, seconds: float) -> dict[str, Any]:
    asker = Asker(server)
    noise, moved, skipped, first = [], [], 0, None
    seed, deadline = 0, time.monotonic() + seconds
    asker.logprobs(False), asker.logprobs(True)  # compiles what it needs
    while time.monotonic() < deadline:
        before = asker.rounds
        alone, together = asker.logprobs(False), asker.logprobs(True)
        if asker.rounds != before:
            skipped += 1  # a rebalance fell between the two: they are of different placements
        else:
            noise.append(differences(alone, together))
        if first is None:
            first = (alone, together)
        else:
            moved += [differences(first[0], alone), differences(first[1], together)]
        if before >= rebalances:
            break
        for _ in range(5):
            seed += 1
            asker.traffic(seed)
    if not noise or not moved:
        raise RuntimeError(f"nothing to compare after {asker.rounds} rebalances; the log says why")
    log = server.summary()
    return {
        "rebalances_that_moved_experts": log.moved,
        "rebalances": len(log.rebalances),
        "results": sorted({rebalance.result for rebalance in log.rebalances}),
        "weights": verification(server.log_text()),
        "rounds": rounds(server.log_text()),
        "askings": len(noise) + skipped,
        "noise_same_placement": summarize(noise),
        "difference_after_rebalances": summarize(moved),
    }


def within_noise(result: dict[str, Any]) -> bool:
    """Means at most half as much again as the noise's; so the 99th percentiles, or no more than the noise's largest.

    Differences come in steps of the last bit, so a percentile of few values jumps."""
    noise, moved = result["noise_same_placement"], result["difference_after_rebalances"]
    return all(
        moved[phase]["mean"] <= 1.5 * noise[phase]["mean"]
        and moved[phase]["p99"] <= max(1.5 * noise[phase]["p99"], noise[phase]["max"])
        for phase in ("prefill", "decode")
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.rebalance_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--rebalances", type=int, default=50)
    timing_options(parser, "asking each server")
    parser.add_argument("--work", type=Path, default=Path("/tmp/rebalance-check"), help="model and logs")
    parser.add_argument("--port", type=int, default=31900)
    options = parser.parse_args(arguments)
    try:
        if not options.cpu:
            need_gpus("bench.gpu.rebalance_check", options.gpus)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    end_cleanly()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    build(options.work / "model", CPU_SIZES if options.cpu else SIZES, "cpu" if options.cpu else "cuda")
    flags = server_flags(options.gpus, options.cpu)
    environment = cpu_environment(2) if options.cpu else {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "128"}
    found: dict[str, Any] = {"date": now(), "provenance": provenance(), "flags": flags}
    with ResidentServers(
        ARMS, options.work / "model", flags, environment, options.work / "servers", options.port
    ) as servers:
        print(f"ready {servers.seconds_to_ready} failed {servers.failed or 'none'}", flush=True)
        wait_for(options.hold)
        for arm in ARMS:
            try:
                if arm.name in servers.failed:
                    raise RuntimeError(servers.failed[arm.name])
                give_turn(servers.servers, arm.name)
                result = check(servers.servers[arm.name], options.rebalances, seconds_left(options))
            except Exception as error:
                result = {"error": str(error)}
            found[arm.name] = {"flags": list(arm.flags), **result, "passed": passed(result, options.rebalances)}
            write_atomically(options.out, json.dumps(found, indent=1, default=float).encode())
            print(json.dumps({arm.name: found[arm.name]}, indent=1, default=float), flush=True)
    return 0 if all(found[arm.name]["passed"] for arm in ARMS) else 1


def passed(result: dict[str, Any], rebalances: int) -> bool:
    """Enough rebalances, differences within the noise, and no slot that held something else than its map said."""
    if "error" in result or not within_noise(result) or result["weights"]["wrong"]:
        return False
    return bool(result["rebalances_that_moved_experts"] >= rebalances)


if __name__ == "__main__":
    sys.exit(main())
