"""Rebalances on GPUs change where experts are and nothing else: logits, over dozens of rebalances.

    python -m bench.gpu.rebalance_check --out FILE.json

Two servers, one after the other: SGLang's own rebalances in chunks of layers, and `--eplb-async`, which also proves
the weights of every slot after each round. Both have random weights, DeepEP's auto mode, redundant experts,
`--ep-dispatch-algorithm cover` and decode CUDA graphs. The same prompts are asked again and again, one at a time and
all at once, and every answer is compared with the same model in float32 without expert parallelism. A server's error
may not grow after its first rebalance. That is asked of errors and not of differences between two placements, which
are reported: each rank rounds its part of a token's sum to bfloat16, so another placement rounds elsewhere, neither
better nor worse. How much a rebalance gone wrong would show is measured too: the error of the model with two experts of
one layer exchanged. `--cpu` rehearses all of it on the CPU engine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.flags import (
    SHARED_MEMORY,
    cpu_flags,
    deepep_flags,
    end_cleanly,
    host_options,
    hosts_of,
    need_gpus,
    seconds_left,
    timing_options,
    wait_for,
)
from bench.gpu.random_moe import MoeSizes, build
from bench.gpu.reference import Reference
from bench.gpu.resident import ResidentArm, ResidentServers
from bench.gpu.rounds import rounds, verification
from bench.harness.engine import cpu_environment, own_models_only
from bench.harness.environment import now, provenance
from bench.harness.output_paths import result_file, write_result
from bench.harness.server import Server
from bench.harness.side_by_side import give_turn
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.rebalance import verify

SIZES = MoeSizes(layers=4)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 160, 4
# Passes between rebalances: more than twice what two askings take, so that the first two come before any rebalance.
ITERATIONS = 100
# A mean error after rebalances over that before. There are about 1300 values a prefill and 32 a decode of 8 prompts.
TOLERANCE = {"prefill": 1.25, "decode": 1.5}
EXACT = 1e-5  # a float32 server's error is rounding, whatever the placement
# What low-latency mode is asked for, of a rank.
DISPATCH_TOKENS = {"auto": 128, "normal": 128, "low_latency": 1024}
V2_TOKENS = 2048  # of a rank in a pass, prefill and decode alike: what DeepEP V2's buffer is made for
INTERVAL = ("--eplb-rebalance-num-iterations", str(ITERATIONS))
CPU_SIZES = MoeSizes(layers=3, hidden=64, expert_width=32, heads=2, kv_heads=1, head_dim=32)
Differences = dict[str, np.ndarray]  # of prefill and decode, one dimension each
ASYNC = ("--eplb-async", "--eplb-min-gain", "0", "--eplb-async-phase-limit", "3600")
ARMS = (
    ResidentArm("sync", ("--eplb-rebalance-layers-per-chunk", "2")),
    ResidentArm("async", ASYNC, {verify.ENVIRONMENT: "1"}),
)


def server_flags(gpus: int, cpu: bool = False, mode: str = "auto") -> list[str]:
    """The CPU engine has no DeepEP; replicas are chosen there as it chooses by default."""
    if cpu:
        return [*cpu_flags(), "--eplb-algorithm", "affinity", "--ep-num-redundant-experts", "8", *INTERVAL]
    flags = [*deepep_flags(gpus), "--cuda-graph-max-bs-decode", "32"]
    if mode == "v2":
        flags[flags.index("deepep")] = "deepep_v2"
    else:
        flags += ["--deepep-mode", mode]
    # Low latency prefills in that mode too, each rank its share of a chunk; V2 has one buffer for both.
    tokens = {"low_latency": DISPATCH_TOKENS["low_latency"], "v2": V2_TOKENS // 2}.get(mode, 4096 // gpus)
    chunk = str(gpus * tokens)
    flags += [*SHARED_MEMORY, "--max-total-tokens", "50000", "--chunked-prefill-size", chunk]
    flags += ["--eplb-algorithm", "affinity", "--ep-num-redundant-experts", "8", "--ep-dispatch-algorithm", "cover"]
    return [*flags, *INTERVAL]


def deepep_environment(mode: str) -> dict[str, str]:
    if mode == "v2":
        return {"SGLANG_DEEPEP_V2_NUM_MAX_DISPATCH_TOKENS_PER_RANK": str(V2_TOKENS)}
    return {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": str(DISPATCH_TOKENS[mode])}


@dataclass(frozen=True)
class Answer:
    """``prefill``: log probabilities of the prompts' tokens, float64 [prompts, tokens - 1]; ``ids`` and ``decode``: new
    tokens and their log probabilities, [prompts, new tokens]."""

    prefill: np.ndarray
    ids: list[list[int]]
    decode: np.ndarray


class Asker:
    def __init__(self, server: Server, reference: Reference) -> None:
        self._server, self._reference = server, reference
        random = np.random.default_rng(0)
        self.prompts: list[list[int]] = random.integers(10, SIZES.vocabulary, (PROMPTS, PROMPT_TOKENS)).tolist()

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

    def answer(self, at_once: bool) -> Answer:
        with ThreadPoolExecutor(PROMPTS if at_once else 1) as pool:
            found = list(pool.map(lambda ids: self._ask(ids, NEW_TOKENS, True), self.prompts))
        prefill = [[entry[0] for entry in meta["input_token_logprobs"][1:]] for meta in found]
        decode = [[entry[0] for entry in meta["output_token_logprobs"]] for meta in found]
        ids = [[entry[1] for entry in meta["output_token_logprobs"]] for meta in found]
        return Answer(np.array(prefill, dtype=float), ids, np.array(decode, dtype=float))

    def errors(self, answer: Answer) -> Differences:
        """Against the reference, given the same tokens."""
        sequences = [[*prompt, *ids] for prompt, ids in zip(self.prompts, answer.ids, strict=True)]
        right = self._reference.logprobs(sequences)
        prefill = answer.prefill - right[:, : PROMPT_TOKENS - 1]
        return {"prefill": np.abs(prefill).ravel(), "decode": np.abs(answer.decode - right[:, -NEW_TOKENS:]).ravel()}

    def traffic(self, seed: int) -> None:
        """Prompts of one part of the vocabulary, so that placements differ from round to round."""
        random = np.random.default_rng(seed)
        low = 10 + seed * 397 % (SIZES.vocabulary - 600)
        prompts = random.integers(low, low + 500, (24, 64)).tolist()
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda ids: self._ask(ids, ITERATIONS, False), prompts))


def differences(a: Answer, b: Answer) -> Differences:
    """Absolute differences of log probabilities; of decoded tokens up to the first that differs."""
    decode = []
    for left, right, of_left, of_right in zip(a.ids, b.ids, a.decode, b.decode, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y), len(left))
        decode.append(np.abs(of_left[:same] - of_right[:same]))
    return {"prefill": np.abs(a.prefill - b.prefill).ravel(), "decode": np.concatenate(decode)}


def summarize(parts: Sequence[Differences]) -> dict[str, Any]:
    out = {}
    for name in ("prefill", "decode"):
        values = np.concatenate([part[name] for part in parts])
        out[name] = {
            "values": len(values),
            "mean": float(values.mean()),
            "p99": float(np.percentile(values, 99)),
            "max": float(values.max()),
        }
    return out


def fault(reference: Reference, asker: Asker, answer: Answer) -> dict[str, Any]:
    """The errors that ``answer`` would have if the server had two experts of one layer exchanged."""
    with reference.swapped(1, 0, 1):
        return summarize([asker.errors(answer)])


def check(server: Server, reference: Reference, rebalances: int, seconds: float) -> dict[str, Any]:
    asker = Asker(server, reference)
    before: list[Differences] = []
    after: list[Differences] = []
    noise: list[Differences] = []
    moved: list[Differences] = []
    first: list[Answer] = []
    seed, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        rounds_before = asker.rounds
        answers = [asker.answer(False), asker.answer(True)]
        rounds_now = asker.rounds
        (after if rounds_before else before).extend(map(asker.errors, answers))
        if rounds_now == rounds_before:
            noise.append(differences(*answers))
        if not first:
            if rounds_now:
                raise RuntimeError("a rebalance came before the first answers")
            first = answers
        else:
            moved += [differences(old, new) for old, new in zip(first, answers, strict=True)]
        if rounds_before >= rebalances:
            break
        for _ in range(5):
            seed += 1
            asker.traffic(seed)
    if not after or not noise:
        raise RuntimeError(f"nothing to compare after {asker.rounds} rebalances; the log says why")
    log = server.summary()
    return {
        "rebalances_that_moved_experts": log.moved,
        "rebalances": len(log.rebalances),
        "results": sorted({rebalance.result for rebalance in log.rebalances}),
        "weights": verification(server.log_text()),
        "rounds": rounds(server.log_text()),
        "answers": {"before": len(before), "after": len(after)},
        "error_before_rebalances": summarize(before),
        "error_after_rebalances": summarize(after),
        "error_with_two_experts_of_a_layer_exchanged": fault(reference, asker, first[0]),
        "difference_same_placement": summarize(noise),
        "difference_to_first_placement": summarize(moved),
    }


def within_noise(result: dict[str, Any]) -> bool:
    """Errors are no larger after rebalances than before, and a fault would have been seen."""
    before, after = result["error_before_rebalances"], result["error_after_rebalances"]
    fault = result["error_with_two_experts_of_a_layer_exchanged"]["prefill"]["mean"]
    return fault > TOLERANCE["prefill"] * before["prefill"]["mean"] and all(
        after[phase]["mean"] <= tolerance * before[phase]["mean"] + EXACT for phase, tolerance in TOLERANCE.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.rebalance_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=result_file, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--mode", choices=(*DISPATCH_TOKENS, "v2"), default="auto", help="of DeepEP, or its V2")
    parser.add_argument("--rebalances", type=int, default=50)
    host_options(parser)
    timing_options(parser, "asking each server")
    parser.add_argument("--work", type=Path, default=Path("/tmp/rebalance-check"), help="model and logs")
    parser.add_argument("--port", type=int, default=31900)
    options = parser.parse_args(arguments)
    try:
        hosts = hosts_of(options, 2 if options.cpu else options.gpus)
        if not options.cpu:
            need_gpus("bench.gpu.rebalance_check", options.gpus // (1 + len(hosts.names)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    end_cleanly()
    device = "cpu" if options.cpu else "cuda"
    build(options.work / "model", CPU_SIZES if options.cpu else SIZES, device)
    flags = server_flags(options.gpus, options.cpu, options.mode)
    environment = cpu_environment(2) | own_models_only() if options.cpu else deepep_environment(options.mode)
    command = "python -m bench.gpu.rebalance_check --out FILE.json" + (" --cpu" if options.cpu else "")
    command += (f" --mode {options.mode}" if options.mode != "auto" else "") + str(hosts)
    found: dict[str, Any] = {"date": now(), "command": command, "provenance": provenance(), "flags": flags}
    with ResidentServers(
        ARMS, options.work / "model", flags, environment, options.work / "servers", options.port, hosts=hosts
    ) as servers:
        print(f"ready {servers.seconds_to_ready} failed {servers.failed or 'none'}", flush=True)
        wait_for(options.hold)
        reference = Reference(options.work / "model", device)
        for arm in ARMS:
            try:
                if arm.name in servers.failed:
                    raise RuntimeError(servers.failed[arm.name])
                give_turn(servers.servers, arm.name)
                result = check(servers.servers[arm.name], reference, options.rebalances, seconds_left(options))
            except Exception as error:
                result = {"error": str(error)}
            found[arm.name] = {"flags": list(arm.flags), **result, "passed": passed(result, options.rebalances)}
            write_result(options.out, found)
            print(json.dumps({arm.name: found[arm.name]}, indent=1, default=float), flush=True)
    return 0 if all(found[arm.name]["passed"] for arm in ARMS) else 1


def passed(result: dict[str, Any], rebalances: int) -> bool:
    """Enough rebalances, errors within the noise, and no slot that held something else than its map said."""
    if "error" in result or not within_noise(result) or result["weights"]["wrong"]:
        return False
    return bool(result["rebalances_that_moved_experts"] >= rebalances)


if __name__ == "__main__":
    sys.exit(main())
