"""The scripts of a sitting on a rented host, with a Python that only notes what it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from bench.__main__ import _load_names
from bench.harness.arms import arms_named
from bench.harness.engine import ROOT
from bench.harness.profile import Profile

PYTHON = """#!/usr/bin/env bash
case "$*" in
  *"bench run"*) echo "$@" >> calls; mkdir -p "results/$RUN/cells/a" "results/$RUN/warm-up"
                 echo row >> "results/$RUN/store.jsonl"; touch "results/$RUN/cells/a/requests.npz"; exit ${CODE:-0} ;;
  *"bench report"*) echo "$@" >> calls ;;
  *quiet_passes*) echo "$@" >> measures ;;
  *) echo /nowhere ;;
esac
"""


def script(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "RUN": "one", **environment}
    return subprocess.run(["bash", *command], cwd=folder, env=variables, capture_output=True, text=True, check=False)


def checkout(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python3").write_text(PYTHON)
    (folder / "bin" / "python3").chmod(0o755)
    shutil.copytree(ROOT / "bench" / "gpu", folder / "bench" / "gpu")


def test_a_sitting_brings_its_rows_back_and_the_next_goes_on(tmp_path: Path) -> None:
    host, here = tmp_path / "host", tmp_path / "here"
    checkout(host)
    checkout(here)
    for code in ("130", "1"):  # out of time; some rows void
        done = script(
            host, "bench/gpu/run_bench.sh", "emulated50", "480", "--blocks", "5", OUT=f"{host}/out", CODE=code
        )
        assert done.returncode == 0, done.stderr
    want = "-m bench run --profile h200-x2 --link emulated50 --run one --seconds 480 --no-report --blocks 5"
    assert (host / "calls").read_text().splitlines() == [want, want]
    (here / "results").mkdir()
    done = script(here, "bench/gpu/collect.sh", f"{host}/out", "one")
    assert done.returncode == 0, done.stderr
    assert (here / "results" / "one" / "store.jsonl").read_text() == "row\nrow\n"
    assert not list(here.glob("results/**/requests.npz")) and not (here / "results" / "one" / "warm-up").exists()
    assert (here / "calls").read_text() == "-m bench report results/one\n"


def test_a_run_that_fails_says_so(tmp_path: Path) -> None:
    checkout(tmp_path)
    assert script(tmp_path, "bench/gpu/run_bench.sh", "nvlink", "480", OUT=f"{tmp_path}/out", CODE="2").returncode == 2
    assert script(tmp_path, "bench/gpu/run_bench.sh").returncode != 0


def share(part: int, parts: int, gpus: str, command: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
    arguments = ["bash", str(ROOT / "bench" / "gpu" / "share.sh"), str(part), str(parts), "bash", "-c", command]
    return subprocess.run(arguments, env=variables, capture_output=True, text=True, check=False)


def test_a_share_has_gpus_and_cores_of_its_own() -> None:
    python = "import os; print(sorted(os.sched_getaffinity(0)), os.environ['CUDA_VISIBLE_DEVICES'])"
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    for part in (0, 1) if half else ():
        done = share(part, 2, "0,1,5,6", f'python3 -c "{python}"')
        expected = cores[part * half : (part + 1) * half]
        assert done.stdout.strip() == f"{expected} {'0,1' if part == 0 else '5,6'}", done.stderr


def test_a_share_without_gpus_is_refused() -> None:
    done = share(0, 2, "0", "echo began")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: share.sh: share 0 of 2 is empty: the host has GPUs '0'" in done.stderr


@pytest.mark.parametrize(
    ("plan", "runs"),
    [
        ("costs.sh", 3),
        ("ep4.sh", 2),
        ("runs.sh {}/replicas.runs", 3),
        ("runs.sh {}/table-nvlink.runs", 1),
        ("runs.sh {}/table-emulated.runs", 1),
    ],
)
def test_a_plan_asks_for_runs_that_there_are(plan: str, runs: int, tmp_path: Path) -> None:
    checkout(tmp_path)
    (tmp_path / "work" / "results").mkdir(parents=True)
    work = {"WORK": f"{tmp_path}/work", "CARRY": f"{tmp_path}/work/carry", "START": str(int(time.time()))}
    command = f"bench/gpu/plans/{plan}".format("bench/gpu/plans").split()
    done = script(tmp_path, *command, REHEARSE="1", PYTHON="python3", **work)
    assert done.returncode == 0 and "over" in done.stdout, done.stdout + done.stderr
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == runs and all({"--no-report", "--rehearse"} <= set(call) for call in calls)
    for call in calls:
        options = dict(pairwise(call))
        profile = Profile.named(options["--profile"])
        profile = profile.with_poisson(float(options["--rate"])) if "--rate" in options else profile
        assert _load_names(options.get("--loads"), profile)
        if "--arms" in options:
            arms_named(options["--arms"].split(","))
    if plan == "costs.sh":
        (measured,) = (tmp_path / "measures").read_text().splitlines()
        assert measured.endswith("--seconds 100 --cpu") and "work/results/quiet-passes.json" in measured


FAKE_NCCL = """
#include <stddef.h>
int ncclCommQueryProperties(void *communicator, char *found) {
    if (communicator) return 5;
    *(int *)(found + 36) = 0; *(int *)(found + 48) = 0; /* ginType and railedGinType of NCCL 2.30: none */
    return 0;
}
"""
ASKING = """
import ctypes, struct
properties = ctypes.create_string_buffer(struct.pack("@NII", 56, 1, 23004).ljust(56, bytes([255])))
query = ctypes.CDLL(None).ncclCommQueryProperties
print(query(None, properties), *struct.unpack_from("@i", properties, 36), *struct.unpack_from("@i", properties, 48))
print(query(ctypes.c_void_p(1), properties))
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_host_without_gin_opens_buffers_of_deepep_v2(tmp_path: Path) -> None:
    (tmp_path / "nccl" / "lib").mkdir(parents=True)
    (tmp_path / "fake.c").write_text(FAKE_NCCL)
    library = tmp_path / "nccl" / "lib" / "libnccl.so.2"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "fake.c"], check=True)
    found = subprocess.run(
        ["bash", "bench/gpu/v2.sh", sys.executable, "-c", ASKING],
        cwd=ROOT, env={**os.environ, "V2": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "0 2 2\n5\n"
