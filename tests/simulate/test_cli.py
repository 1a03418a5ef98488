from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: object):
    command = [sys.executable, "-m", "sglang_eplb_affinity", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture
def trace_file(trace, tmp_path):
    path = tmp_path / "trace.npz"
    trace.save(path)
    return path


def test_simulate_writes_table_json_and_plots(trace_file, system_file, tmp_path):
    out = tmp_path / "out.json"
    done = run(
        "simulate", "--trace", trace_file, "--topology", system_file, "--layers", 2, "--resamples", 2,
        "--prefill-tokens", "256,512", "--decode-batch", 4, "--redundant", 8, "--out", out, "--plots", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SIMULATED. toy") and "recorded routing (trace.npz)" in done.stdout
    data = json.loads(out.read_text())
    assert data["kind"] == "simulated" and len(data["results"]) == 10
    decode = [r for r in data["results"] if r["phase"] == "decode"]
    assert {r["latency_name"] for r in decode} == {"TPOT"}
    assert all("gain_pct_over_eplb" in r for r in decode if r["algorithm"] != "eplb")
    prefill = [r for r in data["results"] if r["phase"] == "prefill" and r["tokens_per_gpu"] == 256]
    for entry in prefill:  # a prompt of 1024 tokens takes four such steps
        assert entry["latency_ms"]["value"] == pytest.approx(4 * entry["step_ms"]["value"])
    assert {path.name for path in tmp_path.glob("*.png")} == {"simulate-toy-decode.png", "simulate-toy-prefill.png"}


def test_replay_and_recommend_run(trace_file, system_file, tmp_path):
    out = tmp_path / "day.json"
    done = run(
        "replay", "--trace", trace_file, "--topology", system_file, "--windows", 4, "--every", "1", "--layers", 1,
        "--tokens-per-gpu", 64, "--out", out, "--plots", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    days = json.loads(out.read_text())["days"]
    assert [d["policy"]["name"] for d in days[:2]] == ["none", "vanilla"] and len(days[0]["windows"]) == 4
    assert (tmp_path / "replay-toy-prefill.png").is_file()
    advice = tmp_path / "advice.json"
    done = run(
        "recommend", "--trace", trace_file, "--topology", system_file, "--layers", 1, "--resamples", 2, "--phase",
        "prefill", "--out", advice,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "prefill:" in done.stdout
    done = run(
        "recommend", "--trace", trace_file, "--topology", system_file, "--layers", 1, "--resamples", 2, "--phase",
        "prefill", "--memory-gb", 4, "--out", advice, "--plot", tmp_path / "memory.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(advice.read_text())["memory"]["prefill"]
    assert [row["knee"] for row in rows].count(True) == 1 and rows[0]["kv_tokens"] == 0
    assert all(a["expert_gb"] < b["expert_gb"] <= 4 for a, b in itertools.pairwise(rows))
    assert "<- knee" in done.stdout and (tmp_path / "memory.png").is_file()
    entry = json.loads(advice.read_text())["recommendations"][0]
    assert entry["enable"] in (True, False) and entry["reasons"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["simulate", "--trace", "missing.npz", "--topology", "deepseek-v3-h800"], "missing.npz"),
        (["simulate", "--topology", "deepseek-v3-h800"], "either --trace or --dump"),
        (["simulate", "--trace", "TRACE", "--topology", "nope"], "no preset 'nope'"),
        (["simulate", "--trace", "TRACE", "--topology", "TOPOLOGY", "--gpus", "8,x"], "--gpus 8,x"),
        (["simulate", "--trace", "TRACE", "--topology", "TOPOLOGY", "--gpus", "6"], "cluster.gpus is 6"),
        (
            ["simulate", "--trace", "TRACE", "--topology", "TOPOLOGY", "--redundant", "3"],
            "--redundant 3: with 16 experts this makes 19 slots",
        ),
        (["simulate", "--trace", "TRACE", "--topology", "TOPOLOGY", "--resamples", "1"], "--resamples 1"),
        (["simulate", "--trace", "TRACE", "--topology", "TOPOLOGY", "--layers", "-1"], "--layers -1"),
        (["simulate", "--trace", "TRACE", "--topology", "TOPOLOGY", "--out", "no/such/x.json"], "no/such"),
        (["replay", "--trace", "TRACE", "--topology", "TOPOLOGY", "--windows", "2"], "--windows 2"),
        (["recommend", "--trace", "TRACE", "--topology", "TOPOLOGY", "--min-gain", "-1"], "--min-gain"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, part, trace_file, system_file):
    names = {"TRACE": trace_file, "TOPOLOGY": system_file}
    done = run(*(names.get(a, a) for a in arguments))
    assert done.returncode == 2
    assert part in done.stderr and done.stderr.count("\n") == 1


def test_simulate_takes_recorder_dumps_with_token_sets(trace, system_file, tmp_path):
    torch = pytest.importorskip("torch")
    from sglang_eplb_affinity.domain.routing import RoutingWindow

    window = RoutingWindow.from_trace(trace, 1024)
    assert window.tokens is not None and window.coactivation is not None
    entry = {
        "version": 1,
        "counts": torch.from_numpy(window.counts),
        "coactivation": torch.from_numpy(window.coactivation),
        "tokens": torch.from_numpy(window.tokens),
    }
    dump, counts_only = tmp_path / "dump.pt", tmp_path / "stat.pt"
    torch.save({"logical_count": entry["counts"], "affinity": entry}, dump)
    torch.save({"rank": 0, "logical_count": entry["counts"]}, counts_only)
    common = ["--topology", system_file, "--layers", 1, "--resamples", 2, "--phase", "decode", "--decode-batch", 16]
    done = run("simulate", "--dump", dump, *common)
    assert done.returncode == 0, done.stderr
    assert "recorded routing (dump.pt)" in done.stdout
    done = run("simulate", "--dump", counts_only, *common)
    assert done.returncode == 2 and "counts only" in done.stderr and done.stderr.count("\n") == 1
