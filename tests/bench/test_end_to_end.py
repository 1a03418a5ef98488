"""The whole path once, on a real patched server: `python -m bench run` from prompts to report."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from bench.engine import ROOT, check_sglang
from bench.profile import PROFILE_DIR
from sglang_eplb_affinity.errors import InputError

pytestmark = pytest.mark.server


def small_profile(folder: Path) -> Path:
    """Profile cpu with so few requests that it takes a minute."""
    text = (PROFILE_DIR / "cpu.toml").read_text(encoding="utf-8")
    text = re.sub(r"(?<=\[load\.requests\]\n).*", "2 = 10\n", text, flags=re.DOTALL)
    text = re.sub(r"^warmup_requests = .*$", "warmup_requests = 8", text, flags=re.MULTILINE)
    path = folder / "small.toml"
    path.write_text(text, encoding="utf-8")
    return path


def prompts(folder: Path) -> Path:
    turns = [
        [{"from": "human", "value": f"{n} lazy dogs and " * (2 + n % 5)}, {"from": "gpt", "value": "no"}]
        for n in range(60)
    ]
    path = folder / "sharegpt.json"
    path.write_text(json.dumps([{"id": str(n), "conversations": turn} for n, turn in enumerate(turns)]))
    return path


@pytest.mark.timeout(900)
def test_affinity_arm_from_prompts_to_report(tmp_path: Path) -> None:
    try:
        check_sglang()
    except InputError as error:
        pytest.skip(str(error))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bench", "run", "--profile", str(small_profile(tmp_path)), "--arms", "affinity"]
    command += [
        "--sharegpt",
        str(prompts(tmp_path)),
        "--results-dir",
        str(tmp_path),
        "--run",
        "one",
        "--port",
        str(port),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    (row,) = pd.read_parquet(tmp_path / "one" / "cells.parquet").to_dict("records")
    assert row["valid"] and row["completed"] == 10 and row["output_tokens"] == 320
    assert row["rebalances"] >= 1 and row["rebalances_failed"] == 0
    assert row["p50_ttft_ms"] > 0 and row["p90_tpot_ms"] > 0 and row["max_itl_ms"] >= row["p95_itl_ms"]
    # 4 ranks on 2 emulated nodes
    assert 0 < row["balancedness_initial"] <= 1 and 1 <= row["gpu_fanout_served"] <= 4
    assert 1 <= row["node_fanout_initial"] <= min(2, row["gpu_fanout_initial"])
    assert (tmp_path / "one" / "report.html").is_file()
    log = (tmp_path / "one" / "server" / "b0-affinity.log").read_text()
    assert str(ROOT) not in log

    again = subprocess.run([*command, "--no-report"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "starting the server" not in again.stderr
