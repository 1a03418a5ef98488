"""What each measure for quiet rows gives, taken away one at a time: times of prefill passes and their spread.

    python -m bench.gpu.quiet_passes --out FILE.json

One server of a profile without EPLB. Full prefill passes, and requests one at a time, are timed with what `python -m
bench run` pins, and then without: schedulers, the rest of the server and the client on cores of their own; tokenizers
and client off the schedulers' cores; several cores a scheduler. They take turns within a round, in an order that
rotates. ``--traces``: torch profiles of both ranks, to see where a pass's time goes (`one`: requests alone, `full`:
full passes). ``--cpu`` rehearses it on the CPU engine, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
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
from bench.harness.profile import Profile
from bench.harness.rehearsal import rehearsal
from bench.harness.server import Server, server_command
from bench.harness.workload import vocabulary_of
from sglang_eplb_affinity.domain.errors import InputError

PROFILE = "h200-x2-table"
ALL = "all pinned"
FULL_PASSES = 16  # of a wave; a rank's first and last may be cut
ALONE = 24  # requests one after the other
LONGEST_S = 120.0
Times = dict[str, list[float]]


def measures(available: Sequence[int], ranks: int) -> dict[str, Cores]:
    """Who gets which cores, by name: all measures, and all but one. Raises InputError for too few cores."""
    own = Cores.of(available, ranks)
    if own is None:
        raise InputError(f"quiet_passes: {len(available)} cores are too few to give {ranks} schedulers their own")
    schedulers = tuple(core for cores in own.schedulers for core in cores)
    every = tuple(available)
    return {
        ALL: own,
        "nothing pinned": Cores((every,) * ranks, every, every),
        "client and tokenizers on the schedulers' cores": Cores(own.schedulers, schedulers, schedulers),
        "one core a scheduler": Cores(tuple(cores[:1] for cores in own.schedulers), own.rest, own.client),
    }


class Requests:
    """Prompts of random ids, each answered with one token."""

    def __init__(self, server: Server, vocabulary: int, tokens: int) -> None:
        self._server, self._random = server, np.random.default_rng(1)
        self._vocabulary, self._tokens = vocabulary, tokens

    def together(self, count: int) -> None:
        self._send(self._random.integers(1, self._vocabulary, (count, self._tokens)).tolist())

    def alone(self, count: int) -> list[float]:
        """Milliseconds of each, the next sent when one is answered."""
        return [self._send(self._random.integers(1, self._vocabulary, self._tokens).tolist()) for _ in range(count)]

    def _send(self, prompts: Any) -> float:
        sampling = {"temperature": 0.0, "max_new_tokens": 1, "ignore_eos": True}
        began = time.monotonic()
        post(self._server, "/generate", {"input_ids": prompts, "sampling_params": sampling})
        return 1000 * (time.monotonic() - began)


def post(server: Server, path: str, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=LONGEST_S) as response:
        response.read()


def full_pass_ms(server: Server, requests: Requests, count: int) -> float:
    """Median over a wave of ``count`` requests; NaN where too few passes were full."""
    start = server.log_size()
    requests.together(count)
    time.sleep(0.1)
    return full_prefills(batch_lines(server.log_text(start))).get("full_prefill_ms", float("nan"))


def spread(values: Sequence[float]) -> dict[str, float]:
    """``spread_pct``: 5th to 95th percentile over the median. Values that are no number are left out."""
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return {}
    low, middle, high = (float(value) for value in np.percentile(known, (5, 50, 95)))
    found = {"median": middle, "p5": low, "p95": high, "spread_pct": 100 * (high - low) / middle}
    return {name: round(value, 3) for name, value in found.items()}


def trace(server: Server, folder: Path, passes: int, load: Callable[[], object]) -> None:
    """A torch profile of ``passes`` passes of each rank under ``load``."""
    folder.mkdir(parents=True, exist_ok=True)
    post(
        server,
        "/start_profile",
        {"output_dir": str(folder.absolute()), "num_steps": passes, "activities": ["CPU", "GPU"]},
    )
    load()
    deadline = time.monotonic() + LONGEST_S
    while not list(folder.glob("*.trace.json.gz")) and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(3)  # the other rank's


def measure(
    server: Server, requests: Requests, which: dict[str, Cores], wave: int, round_: int, found: dict[str, Times]
) -> None:
    """One round, into ``found``."""
    names = list(which)
    for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
        assert server.process is not None
        pin_server(server.process.pid, which[name])
        pin_process(os.getpid(), which[name].client)
        alone = requests.alone(ALONE)
        values = {"full_pass_ms": full_pass_ms(server, requests, wave), "one_request_ms": float(np.median(alone)),
                  "one_request_spread_pct": spread(alone)["spread_pct"]}  # fmt: skip
        for key, value in values.items():
            found.setdefault(name, {}).setdefault(key, []).append(value)
        print(f"round {round_}, {name}: {', '.join(f'{key} {value:.1f}' for key, value in values.items())}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.quiet_passes", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=result_file, required=True)
    parser.add_argument("--profile", default=PROFILE, help=f"[default: {PROFILE}]")
    parser.add_argument("--rounds", type=int, default=6, help="[default: 6]")
    parser.add_argument("--traces", type=result_folder, help="a folder for torch profiles")
    parser.add_argument("--port", type=int, default=33100)
    parser.add_argument("--cpu", action="store_true", help="a rehearsal")
    timing_options(parser, "measuring")
    options = parser.parse_args(arguments)
    end_cleanly()
    profile = Profile.named(options.profile)
    prompt = profile.load.exact_input_tokens or profile.load.input_tokens[1]
    wave = FULL_PASSES * int(profile.server.value("--chunked-prefill-size") or 8192) // prompt
    available = sorted(os.sched_getaffinity(0))
    if options.cpu:
        profile, prompt, wave, every = rehearsal(profile), 16, 8, tuple(available)
        which = {ALL: Cores((every,) * profile.server.ranks, every, every)}
    else:
        need_gpus("quiet_passes", profile.server.ranks)
        which = measures(available, profile.server.ranks)
    engine = prepare_engine(profile.server)
    command = [*server_command(profile.server, ARMS["none"], engine.model), "--port", str(options.port)]
    log = options.out.with_suffix(".server.log")
    result = {
        "provenance": provenance(),
        "date": now(),
        "profile": profile.name,
        "prompt_tokens": prompt,
        "requests": wave,
    }
    found: dict[str, Times] = {}
    with Server(command, engine, log, options.port, profile.server.ready_timeout_s) as server:
        print("ready", flush=True)
        wait_for(options.hold)
        end = time.monotonic() + seconds_left(options)
        requests = Requests(server, vocabulary_of(engine.model), prompt)
        requests.together(wave)  # compiles what they need
        requests.alone(ALONE)
        if options.traces:
            trace(server, options.traces / "one", 4, lambda: requests.alone(10))
            trace(server, options.traces / "full", 4, lambda: requests.together(wave // 2))
        for round_ in range(options.rounds):
            if time.monotonic() > end:
                break
            measure(server, requests, which, wave, round_, found)
            figures = {name: {key: spread(values) for key, values in of.items()} for name, of in found.items()}
            write_result(options.out, {**result, "rounds": round_ + 1, "figures": figures, "values": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
