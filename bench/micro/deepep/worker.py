"""One process per GPU: runs the sections, gathers the ranks' times, and writes the file after every few points."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from bench.micro.deepep.cases import ELASTIC_DECODE_TOKENS, Case, elastic_cases, low_latency_cases, normal_cases
from bench.micro.deepep.timing import Repeats, summarise
from sglang_eplb_affinity.domain.files import write_atomically

MAX_FAILURES = 2
# full_dispatch: with the layout and the wait on the CPU. round_trip: dispatch and combine, replayed in a CUDA graph.
STAGES = {
    "normal": ("dispatch_us", "combine_us", "full_dispatch_us"),
    "low_latency": ("dispatch_us", "combine_us", "round_trip_us"),
    "v2_graph": ("dispatch_us", "combine_us", "round_trip_us"),
    "v2_eager": ("dispatch_us", "combine_us"),
}


class Worker:
    """The sections of one rank. ``settings`` are the parsed options; ``header`` starts the file."""

    def __init__(self, rank: int, settings: dict[str, Any], header: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.world, self.settings = rank, settings["gpus"], settings
        self.result = {**header, "sections": {}}
        self.deadline = time.monotonic() + settings["seconds"]
        self.plan = Repeats(settings["warm_up"], settings["iterations"], settings["repeats"])
        torch.cuda.set_device(rank)
        dist.init_process_group(
            "nccl",
            init_method=f"tcp://127.0.0.1:{settings['port']}",
            rank=rank,
            world_size=self.world,
            timeout=timedelta(seconds=120),
        )
        self.group = dist.new_group(list(range(self.world)))
        self.control = dist.new_group(list(range(self.world)), backend="gloo")

    def run(self) -> None:
        if self.rank == 0:
            self.result["software"] = _software()
        for name in self.settings["sections"]:
            rows: list[dict[str, Any]] = []
            section: dict[str, Any] = {"status": "running", "rows": rows}
            self.result["sections"][name] = section
            try:
                getattr(self, f"_{name}")(rows)
                section["status"] = "complete" if not self._late() else "stopped at the time limit"
            except Exception as error:
                section["status"] = f"failed: {type(error).__name__}: {error}"
                traceback.print_exc()
            self._write()
            print(f"[rank {self.rank}] {name}: {section['status']}, {len(rows)} rows", flush=True)

    def _normal(self, rows: list[dict[str, Any]]) -> None:
        from bench.micro.deepep import normal

        s = self.settings
        buffer = normal.open_buffer(self.group, max(s["hidden"]))
        self._measure_all(
            normal_cases(self.world, s["hidden"], s["tokens"], s["dtypes"]),
            lambda case: normal.measure(case, buffer, self.plan, s["experts"], s["top_k"]),
            rows,
        )

    def _low_latency(self, rows: list[dict[str, Any]]) -> None:
        import torch
        import torch.distributed as dist

        from bench.micro.deepep import low_latency

        s = self.settings
        most = max(s["low_latency_tokens"])
        buffer = low_latency.open_buffer(self.group, max(s["hidden"]), most, s["experts"])
        for hidden in s["hidden"]:
            # Another hidden size lays the buffer out anew; its signals must start from zero.
            torch.cuda.synchronize()
            dist.barrier()
            buffer.clean_low_latency_buffer(most, hidden, s["experts"])
            torch.cuda.synchronize()
            dist.barrier()
            self._measure_all(
                low_latency_cases(self.world, [hidden], s["low_latency_tokens"], s["dtypes"]),
                lambda case: low_latency.measure(case, buffer, self.plan, s["experts"], s["top_k"], most),
                rows,
            )

    def _v2(self, rows: list[dict[str, Any]]) -> None:
        from bench.micro.deepep import elastic

        s = self.settings
        most, decode = max(s["v2_tokens"]), min(ELASTIC_DECODE_TOKENS, max(s["v2_tokens"]))
        buffer = elastic.open_buffer(self.group, max(s["hidden"]), most, s["top_k"])
        self._measure_all(
            elastic_cases(self.world, s["hidden"], s["v2_tokens"], s["dtypes"]),
            lambda case: elastic.measure(
                case,
                buffer,
                self.plan,
                s["experts"],
                s["top_k"],
                decode if case.mode == "v2_graph" and case.tokens <= decode else most,
            ),
            rows,
        )

    def _experts(self, rows: list[dict[str, Any]]) -> None:
        import torch.distributed as dist

        from bench.micro.deepep import experts

        if self.rank == 0:
            try:
                for row in experts.rows(self.plan):
                    rows.append(row)
                    if time.monotonic() > self.deadline:
                        break
            finally:
                dist.barrier(group=self.control)
        else:
            dist.barrier(group=self.control)

    def _measure_all(
        self,
        cases: Iterator[Case],
        measure: Callable[[Case], tuple[np.ndarray, dict[str, Any]]],
        rows: list[dict[str, Any]],
    ) -> None:
        import torch.distributed as dist

        failures = 0
        for number, case in enumerate(cases):
            if self._late():
                return
            error = ""
            times: np.ndarray | None = None
            extra: dict[str, Any] = {}
            try:
                times, extra = measure(case)
            except Exception as caught:
                error = f"{type(caught).__name__}: {caught}"
                traceback.print_exc()
            gathered: list[Any] = [None] * self.world
            dist.all_gather_object(gathered, (error, times, extra), group=self.control)
            errors = [entry[0] for entry in gathered if entry[0]]
            if errors:
                failures += 1
                rows.append({**asdict(case), "error": errors[0][:300]})
                if failures >= MAX_FAILURES:
                    raise RuntimeError(errors[0][:300])
                continue
            rows.append(_row(case, gathered))
            if number % 20 == 0:
                self._write()
                if self.rank == 0:
                    print(f"{case} -> {rows[-1]['dispatch_us']['median']} us", file=sys.stderr, flush=True)

    def _late(self) -> bool:
        """Whether the time is up; all ranks get rank 0's answer."""
        import torch.distributed as dist

        answer: list[Any] = [time.monotonic() > self.deadline]
        dist.broadcast_object_list(answer, src=0, group=self.control)
        return bool(answer[0])

    def _write(self) -> None:
        if self.rank == 0:
            write_atomically(Path(self.settings["out"]), (json.dumps(self.result, indent=1) + "\n").encode())


def _row(case: Case, gathered: list[Any]) -> dict[str, Any]:
    """One row: times are means over the ranks (they wait for each other), copies likewise."""
    times = np.stack([entry[1] for entry in gathered])
    row: dict[str, Any] = {**asdict(case), "fanout": case.fanout}
    row["dispatch_bytes"], row["combine_bytes"] = case.bytes_per_copy()
    for key in gathered[0][2]:
        row[key] = float(np.mean([entry[2][key] for entry in gathered]))
    for number, stage in enumerate(STAGES[case.mode]):
        row[stage] = {
            **summarise(times[:, number].mean(0)),
            "slowest_rank_median": round(float(np.median(times[:, number], axis=(1, 2)).max()), 2),
        }
    return row


def _software() -> dict[str, Any]:
    from importlib import metadata

    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("deep_ep", "tokenspeed-deepep", "sgl-deep-ep"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    try:
        import deep_ep

        found["num_sms"] = int(deep_ep.Buffer.num_sms)
    except Exception:  # only a note in the file
        found["num_sms"] = None
    found["gpu"] = torch.cuda.get_device_name(0)
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def worker_main(rank: int, settings: dict[str, Any], header: dict[str, Any]) -> None:
    """Entry of one process. Leaves without teardown: a failed kernel would hang it."""
    code = 1
    try:
        Worker(rank, settings, header).run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
