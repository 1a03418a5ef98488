"""`python -m bench.micro.deepep --out FILE.json`: measure DeepEP's dispatch and combine on the GPUs of this host."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.flags import need_gpus
from bench.harness.environment import now, provenance
from bench.harness.ports import free_port
from bench.micro.deepep.cases import (
    DTYPES,
    ELASTIC_TOKENS,
    LOW_LATENCY_HIDDEN,
    LOW_LATENCY_TOKENS,
    NORMAL_HIDDEN,
    NORMAL_TOKENS,
    copies,
    elastic_cases,
    low_latency_cases,
    normal_cases,
    topk_ids,
)
from bench.micro.deepep.worker import worker_main
from sglang_eplb_affinity.domain.errors import InputError

SECTIONS = ("normal", "experts", "low_latency", "v2")
# DeepEP V2 needs another build of deep_ep than V1, and another NCCL (bench/gpu/deepep_v2.sh).
DEFAULT_SECTIONS = SECTIONS[:3]
GRACE_SECONDS = 25


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    def listed(kind: Any, known: Sequence[Any] | None = None) -> Any:
        def convert(text: str) -> list[Any]:
            values = [kind(part) for part in text.split(",") if part]
            if not values or any(v not in known if known else v < 1 for v in values):
                raise argparse.ArgumentTypeError(f"{text!r}: expected {', '.join(map(str, known or ['numbers > 0']))}")
            return values

        return convert

    parser = argparse.ArgumentParser(
        prog="python -m bench.micro.deepep", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", required=True, help="result file (JSON); written again and again while it runs")
    parser.add_argument("--gpus", type=int, help="GPUs of this host, 2, 4 or 8; default: all")
    parser.add_argument("--seconds", type=float, default=125.0, help="no new point starts after so many seconds")
    parser.add_argument("--sections", type=listed(str, SECTIONS), default=list(DEFAULT_SECTIONS))
    parser.add_argument("--hidden", type=listed(int, LOW_LATENCY_HIDDEN), default=list(NORMAL_HIDDEN))
    parser.add_argument("--tokens", type=listed(int), default=list(NORMAL_TOKENS), help="per GPU, normal mode")
    parser.add_argument("--low-latency-tokens", type=listed(int), default=list(LOW_LATENCY_TOKENS), help="per GPU")
    parser.add_argument("--v2-tokens", type=listed(int), default=list(ELASTIC_TOKENS), help="per GPU, DeepEP V2")
    parser.add_argument("--dtypes", type=listed(str, DTYPES), default=list(DTYPES), help="of dispatch")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="list the points and check their routing; no GPU needed")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Checked settings; raises InputError."""
    settings = {key: value for key, value in vars(options).items() if key != "dry_run"}
    if settings["gpus"] is None:
        settings["gpus"] = 2 if options.dry_run else _visible_gpus()
    if settings["gpus"] not in (2, 4, 8):
        raise InputError(f"--gpus: {settings['gpus']}, but DeepEP on one host runs on 2, 4 or 8 GPUs")
    if settings["experts"] % settings["gpus"] or settings["top_k"] > settings["experts"] // settings["gpus"]:
        raise InputError(
            f"--experts: {settings['experts']} must be a multiple of {settings['gpus']} GPUs "
            f"with at least top-k ({settings['top_k']}) on each"
        )
    if settings["iterations"] < 4 or settings["repeats"] < 1 or settings["warm_up"] < 1:
        raise InputError("--iterations must be at least 4, --repeats and --warm-up at least 1")
    if not Path(settings["out"]).absolute().parent.is_dir():
        raise InputError(f"--out: the folder of {settings['out']} does not exist")
    if Path(settings["out"]).is_dir():
        raise InputError(f"--out: {settings['out']} is a folder; name a file")
    return settings


def dry_run(settings: dict[str, Any]) -> dict[str, int]:
    """Make the routing of every point on every rank and check its fan-out; returns the number of points."""
    gpus, experts, top_k = settings["gpus"], settings["experts"], settings["top_k"]
    normal = list(normal_cases(gpus, settings["hidden"], settings["tokens"], settings["dtypes"]))
    low = list(low_latency_cases(gpus, settings["hidden"], settings["low_latency_tokens"], settings["dtypes"]))
    elastic = list(elastic_cases(gpus, settings["hidden"], settings["v2_tokens"], settings["dtypes"]))
    for case in {(c.routing, c.tokens): c for c in [*normal, *low, *elastic]}.values():
        for rank in range(gpus):
            ids = topk_ids(case, rank, gpus, experts, top_k)
            if any(len(set(row)) != top_k for row in ids.tolist()):
                raise InputError(f"{case}: an expert twice in one token")
            if case.tokens % 2 == 0 and not np.isclose(sum(copies(ids, rank, gpus, experts)), case.fanout):
                raise InputError(f"{case}: fan-out is not {case.fanout}")
    return {"normal": len(normal), "low_latency": len(low), "v2": len(elastic)}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        settings = settings_of(options)
        if options.dry_run:
            print(json.dumps({"dry_run": True, "points": dry_run(settings)}))
            return 0
        need_gpus("bench.micro.deepep", settings["gpus"])
        return _run(settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(settings: dict[str, Any]) -> int:
    settings["port"] = free_port()
    # Only the file's name: folders of the machine that measures are nobody's business.
    given = [Path(part).name if part == settings["out"] else part for part in sys.argv[1:]]
    command = "python -m bench.micro.deepep " + " ".join(given)
    shown = {key: value for key, value in settings.items() if key not in ("out", "port")}
    header = {"schema": 1, "kind": "measured", "date": now(), "command": command, "settings": shown, **provenance()}
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker_main, args=(r, settings, header)) for r in range(settings["gpus"])]
    for process in processes:
        process.start()
    deadline = time.monotonic() + settings["seconds"] + GRACE_SECONDS
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    codes = [process.exitcode for process in processes if process not in late]
    if late or any(codes):
        print(
            f"error: {len(late)} ranks did not end in time, exit codes {codes}; {settings['out']} has what was done",
            file=sys.stderr,
        )
        return 1
    return 0


def _visible_gpus() -> int:
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        raise InputError(f"--gpus: {count} GPUs are visible, but DeepEP needs at least 2 (--dry-run works without)")
    return 8 if count >= 8 else 4 if count >= 4 else 2


if __name__ == "__main__":
    raise SystemExit(main())
