"""The whole path once, on a real patched server: `python -m bench run` from prompts to report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.engines.emulated_hosts import NAMES, emulation_missing
from bench.harness.engine import ROOT, check_sglang
from bench.harness.ports import free_port
from bench.harness.profile import PROFILE_DIR
from bench.publish.table import read_table
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.rebalance import verify

pytestmark = pytest.mark.server


def small_profile(folder: Path) -> Path:
    """Profile cpu with few and short requests, which takes a minute, and windows to match."""
    text = (PROFILE_DIR / "cpu.toml").read_text(encoding="utf-8")
    text = re.sub(r"(?<=\[load\.requests\]\n).*", "2 = 10\n", text, flags=re.DOTALL)
    text = re.sub(r"^warmup_requests = .*$", "warmup_requests = 8", text, flags=re.MULTILINE)
    text = re.sub(r"^output_tokens = .*$", "output_tokens = 16", text, flags=re.MULTILINE)
    text = text.replace("blocks = 2", "blocks = 1").replace("arms_side_by_side = true", "arms_side_by_side = false")
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


def bench_run(folder: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    try:
        check_sglang()
    except InputError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "bench", "run", "--results-dir", str(folder), "--run", name, *options]
    if "--other-hosts" in options:
        command = [sys.executable, "-m", "bench.engines.emulated_hosts", *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)
def test_affinity_arm_from_prompts_to_report(tmp_path: Path) -> None:
    """Over two hosts, where this machine can emulate them."""
    can_emulate = emulation_missing() is None
    options = ["--profile", str(small_profile(tmp_path)), "--arms", "affinity", "--sharegpt", str(prompts(tmp_path))]
    options += ["--port", str(free_port())]
    if can_emulate:
        options += ["--other-hosts", NAMES[1], "--dist-init-addr", f"{NAMES[0]}:5000"]
    done = bench_run(tmp_path, "one", *options)
    assert done.returncode == 0, done.stderr[-3000:]

    (row,) = read_table(tmp_path / "one").to_dict("records")
    # The first of the two slots begins with half a request.
    assert row["valid"] and row["completed"] == 10 and row["output_tokens"] == 8 + 9 * 16
    assert row["rebalances"] >= 1 and row["rebalances_failed"] == 0
    assert row["p50_ttft_ms"] > 0 and row["p90_tpot_ms"] > 0 and row["max_itl_ms"] >= row["p95_itl_ms"]
    assert 0 < row["steady_s"] < row["duration_s"] and 1.4 <= row["mean_concurrency"] <= 2.001
    # 4 ranks on 2 emulated nodes
    assert 0 < row["balancedness_initial"] <= 1 and 1 <= row["gpu_fanout_served"] <= 4
    assert 1 <= row["node_fanout_initial"] <= min(2, row["gpu_fanout_initial"])
    assert row["remote_gpu_copies_served"] == pytest.approx(0.75 * row["gpu_fanout_served"], abs=1e-3)
    assert (tmp_path / "one" / "report.html").is_file()
    log = (tmp_path / "one" / "server" / "b0-affinity.log").read_text()
    assert str(ROOT) not in log
    if can_emulate:
        second = (tmp_path / "one" / "server" / "b0-affinity-host1.log").read_text()
        assert "TP3 EP3]" in second and "TP3 EP3]" not in log and str(ROOT) not in second

    again = bench_run(tmp_path, "one", *options, "--no-report")
    assert again.returncode == 0 and "starting the server" not in again.stderr


@pytest.mark.timeout(1200)
def test_a_gpu_profile_rehearsed_with_arms_side_by_side(tmp_path: Path) -> None:
    """The steps of `make bench PROFILE=h200-x2`: servers that start together, take turns, and replay routing."""
    options = ["--profile", "h200-x2", "--rehearse", "--arms", "none,affinity", "--port", str(free_port())]
    done = bench_run(tmp_path, "two", *options, "--no-report")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("starting servers") == 1 and "2 ready after" in done.stderr
    records = [json.loads(line) for line in (tmp_path / "two" / "store.jsonl").read_text().splitlines()]
    order = [(record["key"]["concurrency"], record["key"]["arm"]) for record in records]
    assert [level for level, _ in order] == [2, 2, 4, 4] and order[0][1] == order[3][1] != order[1][1] == order[2][1]
    assert not any(record["void"] for record in records)
    assert len({record["provenance"]["sitting"] for record in records}) == 1
    assert (tmp_path / "two" / "routing.npz").is_file()
    assert all((tmp_path / "two" / "cells" / f"b0-{arm}-c{c}" / "timeline.npz").is_file() for c, arm in order)
    replayed = "--ep-forced-routing replay:bench/data/tiny_moe_test.npz,layers=cycle"
    assert all(replayed in " ".join(record["provenance"]["server_flags"]) for record in records)


@pytest.mark.timeout(1200)
def test_rounds_beside_decoding_and_requests_that_just_arrive(tmp_path: Path) -> None:
    """The loads of `h200-x2-stall`, with weights proven after each round, and Poisson arrivals beside them."""
    options = ["--profile", "h200-x2-stall", "--rehearse", "--arms", "vanilla-unrecorded,async-verified", "--rate", "2"]
    options += ["--loads", "decode,poisson", "--port", str(free_port())]
    done = bench_run(tmp_path, "three", *options, "--no-report")
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "three" / "store.jsonl").read_text().splitlines()]
    rows = {(record["key"]["load"], record["key"]["arm"]): record for record in records}
    assert len(rows) == 4 and not any(record["void"] for record in records)
    for arm in ("vanilla-unrecorded", "async-verified"):
        decode, poisson = rows["decode", arm]["metrics"], rows["poisson", arm]["metrics"]
        assert decode["max_itl_ms"] >= decode["p99_itl_ms"] > 0 and decode["mean_concurrency"] == pytest.approx(4)
        assert poisson["completed"] == 12 and poisson["p50_ttft_ms"] > 0
    assert rows["decode", "vanilla-unrecorded"]["placement"]["rebalances"] >= 1
    log = (tmp_path / "three" / "server" / "async-verified.log").read_text()
    assert "verify: all" in log and verify.WRONG not in log
    applied = [r for record in records for r in record["rebalances"] if r["result"] == "applied"]
    assert applied and all(ms > 0 for r in applied for ms in r["commit_ms"])
