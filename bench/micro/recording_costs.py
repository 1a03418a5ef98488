"""What recording costs the decode passes of a served model on the CPU: the same requests with it off and on, in turn.

    python -m bench.micro.recording_costs --out FILE.json

Two servers of the small trained model on one rank, where nothing hides the host's work, run side by side and the other
is paused: one without the recorder, and one with it, on which recording is stopped and started over HTTP. A block has
one batch of requests under each, in changing order; a decode pass is timed between the first and the last tokens
streamed, as are the process's seconds on a CPU, which what else runs on the machine disturbs less. Without Triton
recording is some operations of plain torch a layer, which are counted; on CUDA it is part of one launch
(bench.gpu.kernel_times).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.figures.stats import ratio_by_block
from bench.gpu.resident import ResidentArm, ResidentServers
from bench.harness.engine import ROOT, check_sglang, cpu_environment, own_models_only
from bench.harness.environment import now, provenance
from bench.harness.output_paths import write_result
from bench.harness.ports import free_port
from bench.harness.process import last_error
from bench.harness.server import Server, ServerFailed
from bench.harness.side_by_side import give_turn
from bench.micro.options import out_and_repeats
from bench.micro.round_costs import Launches
from sglang_eplb_affinity.device.map_and_record import MapAndRecord
from sglang_eplb_affinity.device.recorder import AffinityRecorder, one_group
from sglang_eplb_affinity.domain.errors import InputError

MODEL = ROOT / "bench" / "engines" / "tiny_moe" / "model"
REQUESTS, INPUT_TOKENS, OUTPUT_TOKENS = 8, 32, 96
CPU = ", CPU time"
FLAGS = (
    "--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native", "--disable-cuda-graph",
    "--disable-radix-cache", "--context-length", "512", "--max-total-tokens", "8192", "--max-running-requests", "16",
    "--disable-overlap-schedule", "--stream-interval", "16",
)  # fmt: skip
ARMS = (ResidentArm("without"), ResidentArm("recorder", ("--enable-expert-affinity-recorder",)))
# Condition: the server that has it, and whether it records then.
CONDITIONS = {"without the recorder": ("without", False), "stopped": ("recorder", False), "on": ("recorder", True)}


def _post(server: Server, path: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body or {}).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def cpu_seconds(server: Server) -> float:
    """CPU time of the process that runs the passes, since it started."""
    assert server.process is not None
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError, ValueError):
            group = int((path.parent / "stat").read_text().rpartition(")")[2].split()[2])
            if group == server.process.pid and path.read_bytes().startswith(b"sglang::scheduler"):
                tasks = (path.parent / "task").glob("*/schedstat")
                return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
    raise ServerFailed("no process sglang::scheduler among its own")


def decode(server: Server, seed: int) -> tuple[float, float]:
    """(seconds, seconds of CPU time) of a decode pass, of one batch of requests that begin and end together."""
    ids = np.random.default_rng(seed).integers(10, 1000, (REQUESTS, INPUT_TOKENS)).tolist()
    sampling = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    seen: list[tuple[float, float, int]] = []
    with _post(server, "/generate", {"input_ids": ids, "sampling_params": sampling, "stream": True}) as answer:
        for line in answer:
            text = line.decode().removeprefix("data: ").strip()
            if text.startswith("{"):
                found = json.loads(text)
                if "error" in found:
                    raise ServerFailed(f"a batch of requests failed: {found['error']}")
                if found.get("index", 0) == 0:
                    seen.append(
                        (time.perf_counter(), cpu_seconds(server), int(found["meta_info"]["completion_tokens"]))
                    )
    (began, cpu_began, first), (ended, cpu_ended, last) = seen[0], seen[-1]
    if last - first < OUTPUT_TOKENS // 2:
        why = last_error(server.log, "too few to time decode passes")
        raise ServerFailed(f"streamed tokens {first} to {last} of {OUTPUT_TOKENS}: {why}")
    return (ended - began) / (last - first), (cpu_ended - cpu_began) / (last - first)


def operations(layers: int) -> int:
    """Operations of torch that recording adds to a decode pass of a model like the served one, in plain torch."""
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    experts, top_k = config["num_experts"], config["num_experts_per_tok"]
    recorder = AffinityRecorder(num_layers=layers, num_experts=experts, top_k=top_k)
    step, rows = MapAndRecord(top_k, recorder, None), one_group(REQUESTS)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(REQUESTS)])
    with Launches() as launches:
        recorder.begin_pass([REQUESTS], phase=1)
        for layer in range(layers):
            step.reference(layer, ids, rows)
        recorder.end_pass()
    return launches.count


def turn(servers: ResidentServers, condition: str) -> Server:
    """The condition's server, alone running, recording or not."""
    name, records = CONDITIONS[condition]
    give_turn(servers.servers, name)
    server = servers.servers[name]
    if records:
        _post(server, "/start_expert_distribution_record").read()
    return server


def end_turn(server: Server, condition: str) -> None:
    if CONDITIONS[condition][1]:
        _post(server, "/stop_expert_distribution_record").read()


def decode_times(servers: ResidentServers, blocks: int) -> list[dict[str, float]]:
    """Of each block milliseconds a decode pass by condition, and of CPU time by condition + ``CPU``."""
    rows = []
    for block in range(-1, blocks):
        row: dict[str, float] = {}
        for place in range(len(CONDITIONS)):
            condition = list(CONDITIONS)[(block + place) % len(CONDITIONS)]
            server = turn(servers, condition)
            seconds, cpu = decode(server, block + 1)
            row |= {condition: 1000 * seconds, condition + CPU: 1000 * cpu}
            end_turn(server, condition)
        if block >= 0:  # the first is warm-up
            rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    options = out_and_repeats("bench.micro.recording_costs", __doc__, 20, arguments)
    try:
        check_sglang()
        result = _measured(options.repeats)
    except (InputError, ServerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    for name, ratio in result["ratios"].items():
        print(f"decode pass, {name}: {ratio['ratio']} ({ratio['lower']} to {ratio['upper']})")
    print(f"operations of torch that recording adds to a pass: {result['operations_added']}")
    write_result(options.out, result)
    return 0


def _measured(repeats: int) -> dict[str, Any]:
    environment = {**cpu_environment(1), **own_models_only()}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        with ResidentServers(ARMS, MODEL, FLAGS, environment, folder / "logs", free_port()) as servers:
            if servers.failed:
                raise ServerFailed("; ".join(f"{name}: {why}" for name, why in servers.failed.items()))
            rows = decode_times(servers, repeats)
    return result_of(rows, repeats)


def result_of(rows: list[dict[str, float]], repeats: int) -> dict[str, Any]:
    """The file's content, from :func:`decode_times`."""
    layers = int(json.loads((MODEL / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"])
    ratios = {
        f"{condition} / stopped{kind}": ratio_by_block(
            {block: row[condition + kind] for block, row in enumerate(rows)},
            {block: row["stopped" + kind] for block, row in enumerate(rows)},
        ).as_dict()
        for kind in ("", CPU)
        for condition in ("on", "without the recorder")
    }
    source = provenance()
    added = operations(layers)
    common = {
        "kind": "measured", "hardware": source["hardware"], "versions": source["versions"], "commit": source["commit"],
        "date": now(), "command": f"python -m bench.micro.recording_costs --repeats {repeats} --out FILE",
    }  # fmt: skip
    return {
        "date": common["date"], "provenance": source, "model": str(MODEL.relative_to(ROOT)),
        "layers": layers,
        "requests": REQUESTS, "output_tokens": OUTPUT_TOKENS, "flags": list(FLAGS),
        "median_ms": {name: round(float(np.median([row[name] for row in rows])), 3) for name in rows[0]},
        "ratios": ratios, "operations_added": added,
        "blocks": [{name: round(value, 3) for name, value in row.items()} for row in rows],
        "entries": [
            *(
                {"name": f"recording.cpu.{name}", "value": found["ratio"], "lower": found["lower"],
                 "upper": found["upper"], "unit": "ratio to recording stopped", **common}
                for name, found in (("decode_pass_ratio", ratios["on / stopped"]),
                                    ("decode_cpu_time_ratio", ratios["on / stopped" + CPU]))
            ),
            {"name": "recording.cpu.operations_added", "value": added, "lower": added, "upper": added,
             "unit": "torch operations a pass", **common},
        ],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
