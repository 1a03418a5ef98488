"""bench/gpu/measure.sh with a Python that only notes when it measures: steps of a group start together, take turns."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from bench.harness.engine import ROOT

# Servers get ready, wait for the file after --hold, then measure; what times kernels measures at once.
PYTHON = """#!/usr/bin/env bash
all="$* "; name=tests
case $all in *rebalance_check*) name=check ;; *kernel_times*) name=kernel ;;
  *"bench run --profile "*) name=${all#*--profile }; name=${name%% *} ;; esac
echo "$name starts" >> "$CALLS"
case $name in check | h200-*)
  sleep 0.3; [ $name = check ] && echo "ready {'a': 1} failed none" || echo "side-by-side: 4 ready after 9 s"
  case $all in *"--hold "*) file=${all#*--hold }; until [ -e "${file%% *}" ]; do sleep 0.05; done ;; esac ;;
esac
echo "$name measures" >> "$CALLS"; sleep 0.3; echo "$name is over" >> "$CALLS"
[ "$name" != "$FAILS" ]
"""


def measure(folder: Path, *groups: str, fails: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python3").write_text(PYTHON)
    (folder / "bin" / "python3").chmod(0o755)
    shutil.copytree(ROOT / "bench" / "gpu", folder / "bench" / "gpu")
    (folder / "home" / ".cache").mkdir(parents=True)
    variables = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "FAILS": fails}
    variables |= {"HOME": str(folder / "home"), "WORK": str(folder / "work"), "CALLS": str(folder / "calls")}
    command = ["bash", "bench/gpu/measure.sh", str(folder / "out"), *groups]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=120)
    return done, (folder / "calls").read_text().splitlines()


def test_servers_of_a_group_start_together_and_nothing_is_measured_beside_anything(tmp_path: Path) -> None:
    done, calls = measure(tmp_path, "tests+check+kernel+h200-x2-idle+h200-x2-stall", "h200-x2-modes")
    assert done.returncode == 0, done.stdout + done.stderr
    turns = ["tests", "check", "kernel", "h200-x2-idle", "h200-x2-stall", "h200-x2-modes"]
    assert [call for call in calls if not call.endswith("starts")] == [
        f"{name} {what}" for name in turns for what in ("measures", "is over")
    ]
    assert calls.index("h200-x2-idle starts") < calls.index("check measures"), "its servers start meanwhile"
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert {f"./{name}.log" for name in turns} <= set(archive.getnames())
    assert (tmp_path / "out" / "caches.tar.xz").stat().st_size


def test_a_step_that_fails_is_named_and_the_next_goes_on(tmp_path: Path) -> None:
    done, calls = measure(tmp_path, "check+h200-x2-idle", fails="check")
    assert done.returncode == 1 and "== check: exit code 1" in done.stdout
    assert calls[-1] == "h200-x2-idle is over" and "== h200-x2-idle: exit code 0" in done.stdout
