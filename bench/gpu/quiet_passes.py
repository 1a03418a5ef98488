"""What each measure for quiet rows gives, taken away one at a time: times of prefill passes and their spread.

    python -m bench.gpu.quiet_passes --out FILE.json

Two servers of a profile without EPLB, one of which is measured. Full prefill passes, and requests one at a time, are
timed with all measures of `python -m bench run` on, and then without each: schedulers, the rest of a server and the
client on cores of their own; the tokenizers and the client off the schedulers' cores; the other server paused. All of
them take turns within a round, in an order that rotates. ``--traces``: torch profiles of both ranks, kept for a look
(`one`: requests alone, `full`: full passes). ``--cpu`` rehearses it on the CPU engine, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.figures.server_log import batch_lines, full_prefills
from bench.gpu.flags import end_cleanly, need_gpus, seconds_left, timing_options, wait_for
from bench.harness.arms import ARMS
from bench.harness.engine import prepare_engine
from bench.harness.environment import now, provenance
from bench.harness.output_paths import result_file, result_folder, write_result
from bench.harness.pinning import Cores, pin_process, pin_server
from bench.harness.ports import free_port
from bench.harness.profile import Profile
from bench.harness.rehearsal import rehearsal
from bench.harness.server import PORT_STEP, Server, server_command
from bench.harness.side_by_side import (
    SIDE_BY_SIDE_ENVIRONMENT,
    SIDE_BY_SIDE_FLAGS,
    give_turn,
    start_together,
    stop_together,
)
from bench.harness.workload import vocabulary_of
from sglang_eplb_affinity.domain.errors import InputError

PROFILE = "h200-x2-table"
MEASURED, OTHER = "measured", "other"
FULL_PASSES = 16  # of a wave; a rank's first and last may be cut
ALONE = 24  # requests one after the other
ALL = "all measures"
LONGEST_S = 120.0


@dataclass(frozen=True)
class Measure:
    """What is on: who gets which ``cores`` (None: all get all), and whether the other server is ``paused``."""

    cores: Cores | None
    paused: bool = True


def measures(available: Sequence[int], ranks: int) -> dict[str, Measure]:
    """By name: all, and all but one. Raises InputError where there are too few cores to give everyone its own."""
    own = Cores.of(available, ranks)
    if own is None:
        raise InputError(f"quiet_passes: {len(available)} cores are too few for {ranks} schedulers with their own")
    theirs = tuple(core for cores in own.schedulers for core in cores)
    single = Cores(tuple(cores[:1] for cores in own.schedulers), own.rest, own.client)
    return {
        ALL: Measure(own),
        "nothing pinned": Measure(None),
        "client and tokenizers on the schedulers' cores": Measure(Cores(own.schedulers, theirs, theirs)),
        "other server not paused": Measure(own, paused=False),
        "one core a scheduler": Measure(single),
    }


class Requests:
    """Prompts of random ids, sent as one list or one at a time, each answered with one token."""

    def __init__(self, server: Server, vocabulary: int, tokens: int) -> None:
        self._server, self._random = server, np.random.default_rng(1)
        self._vocabulary, self._tokens = vocabulary, tokens

    def _send(self, prompts: Any) -> float:
        sampling = {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True}
        data = json.dumps({"input_ids": prompts, "sampling_params": sampling}).encode()
        began = time.monotonic()
        post(self._server, "/generate", data)
        return time.monotonic() - began

    def together(self, count: int) -> float:
        """Seconds until all are answered."""
        return self._send(self._random.integers(1, self._vocabulary, (count, self._tokens)).tolist())

    def alone(self, count: int) -> list[float]:
        """Seconds of each, the next sent when one is answered."""
        return [self._send(self._random.integers(1, self._vocabulary, self._tokens).tolist()) for _ in range(count)]


def post(server: Server, path: str, data: bytes) -> None:
    request = urllib.request.Request(f"{server.url}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=LONGEST_S) as response:
        response.read()


def times_of_full_passes(server: Server, requests: Requests, count: int) -> float:
    """Milliseconds of a full pass, the median over a wave; NaN where too few were full."""
    start = server.log_size()
    requests.together(count)
    time.sleep(0.1)
    return full_prefills(batch_lines(server.log_text(start))).get("full_prefill_ms", float("nan"))


def spread(values: Sequence[float]) -> dict[str, float]:
    """``spread_pct``: 5th to 95th percentile over the median."""
    low, middle, high = np.nanpercentile(values, (5, 50, 95))
    return {
        "median": round(middle, 3),
        "p5": round(low, 3),
        "p95": round(high, 3),
        "spread_pct": round(100 * (high - low) / middle, 2),
    }


def trace(server: Server, folder: Path, passes: int, load: Callable[[], object], with_stack: bool) -> None:
    """A torch profile of ``passes`` passes of each rank under ``load``."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"output_dir": str(folder.absolute()), "num_steps": passes, "activities": ["CPU", "GPU"]}
    post(server, "/start_profile", json.dumps({**body, "with_stack": with_stack, "record_shapes": False}).encode())
    load()
    deadline = time.monotonic() + LONGEST_S
    while not list(folder.glob("*.trace.json.gz")) and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(3)  # the other rank's


def start(profile: Profile, folder: Path, port: int, stack: ExitStack) -> dict[str, Server]:
    config, engine = profile.server, prepare_engine(profile.server)
    engine.environment.update(SIDE_BY_SIDE_ENVIRONMENT)
    servers = {}
    for place, name in enumerate((MEASURED, OTHER)):
        command = server_command(config, ARMS["none"], engine.model, place)
        command += ["--port", str(port + PORT_STEP * place), "--nccl-port", str(free_port()), *SIDE_BY_SIDE_FLAGS]
        log = folder / f"server-{name}.log"
        servers[name] = Server(command, engine, log, port + PORT_STEP * place, config.ready_timeout_s)
    stack.callback(stop_together, list(servers.values()))
    failed = start_together(servers, print).failed
    if failed:
        raise InputError(f"quiet_passes: {'; '.join(f'{name}: {why}' for name, why in failed.items())}")
    return servers


def apply(measure: Measure, servers: dict[str, Server], everything: Sequence[int]) -> None:
    """Pin whom the measure pins, and let the measured server run."""
    cores, ranks = measure.cores, max(1, len(measure.cores.schedulers) if measure.cores else 1)
    own = cores or Cores(tuple(tuple(everything) for _ in range(ranks)), tuple(everything), tuple(everything))
    if cores is None:
        own = Cores((tuple(everything),) * 64, tuple(everything), tuple(everything))
    for server in servers.values():
        if server.process is not None:
            pin_server(server.process.pid, own)
    pin_process(os.getpid(), own.client)
    give_turn(servers, MEASURED)
    if not measure.paused:
        servers[OTHER].resume()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.quiet_passes", description=__doc__)
    parser.add_argument("--out", type=result_file, required=True)
    parser.add_argument("--profile", default=PROFILE)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--traces", type=result_folder)
    parser.add_argument("--port", type=int, default=33100)
    parser.add_argument("--cpu", action="store_true", help="a rehearsal")
    timing_options(parser, "measuring")
    options = parser.parse_args(arguments)
    end_cleanly()
    profile = Profile.named(options.profile)
    prompt = profile.load.exact_input_tokens or profile.load.input_tokens[1]
    chunk = int(profile.server.value("--chunked-prefill-size") or 8192)
    if options.cpu:
        profile, prompt, chunk = rehearsal(profile), 16, 64
    else:
        need_gpus("quiet_passes", profile.server.ranks)
    available = sorted(os.sched_getaffinity(0))
    everyone = list(range(16)) if options.cpu and len(available) < 16 else available
    which = measures(everyone, profile.server.ranks)
    if options.cpu:
        which = {name: Measure(None, measure.paused) for name, measure in which.items()}
    result: dict[str, Any] = {"provenance": provenance(), "date": now(), "profile": profile.name}
    result |= {"prompt_tokens": prompt, "tokens_of_a_pass": chunk, "rounds": 0}
    began = time.monotonic()
    with ExitStack() as stack:
        servers = start(profile, options.out.parent / f"{options.out.stem}-servers", options.port, stack)
        print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
        wait_for(options.hold)
        server = servers[MEASURED]
        requests = Requests(server, vocabulary_of(prepare_engine(profile.server).model), prompt)
        wave = FULL_PASSES * chunk // prompt
        apply(which[ALL], servers, available)
        requests.together(wave)
        requests.alone(8)
        if options.traces:
            for name, stacks in (("one", False), ("one-stacks", True)):
                trace(server, options.traces / name, 4, lambda: requests.alone(10), stacks)
            trace(server, options.traces / "full", 4, lambda: requests.together(wave // 2), False)
            requests.together(wave)
        found: dict[str, dict[str, list[float]]] = {
            name: {"full_pass_ms": [], "one_request_ms": [], "one_request_spread_pct": []} for name in which
        }
        left = time.monotonic() + seconds_left(options)
        for round_ in range(options.rounds):
            names = list(which)
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                if time.monotonic() > left:
                    break
                apply(which[name], servers, available)
                found[name]["full_pass_ms"].append(times_of_full_passes(server, requests, wave))
                alone = [1000 * seconds for seconds in requests.alone(ALONE)]
                found[name]["one_request_ms"].append(float(np.median(alone)))
                found[name]["one_request_spread_pct"].append(spread(alone)["spread_pct"])
                print(round_, name, {key: round(values[-1], 2) for key, values in found[name].items()}, flush=True)
            result["rounds"] = round_ + 1
            result["measures"] = {
                name: {key: spread(values) for key, values in of.items() if values} for name, of in found.items()
            }
            result["values"] = found
            write_result(options.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
