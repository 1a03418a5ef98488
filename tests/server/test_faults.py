"""What goes wrong leaves the server serving, and SGLang's own faults on EPLB's path are mended."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from bench.harness.engine import cpu_environment
from tests.server.harness import ServerCase, prompts, serve

HERE = Path(__file__).parent


def test_failures_and_http_endpoints_leave_the_window_and_the_last_map(models: Path, tmp_path: Path, port: int) -> None:
    case = ServerCase("qwen3moe", algorithm="affinity", redundant=4, iterations=40)
    dumps = {"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(tmp_path)}
    plugins = (str(HERE / "plugins"),)
    log = tmp_path / "log"
    with serve(models / case.model, case.flags, log, port=port, ranks=2, python_path=plugins, **dumps) as server:
        first = server.generate(prompts(1), tokens=25, concurrency=1)
        for action in ("dump", "stop", "dump", "start"):
            server.post(f"/{action}_expert_distribution_record")
        while len(server.rebalances().rebalances) < 4:
            again = server.generate(prompts(1), tokens=25, concurrency=1)
            assert again[0]["output_ids"] == first[0]["output_ids"]
        rebalances = server.rebalances().rebalances
    assert [rebalance.result for rebalance in rebalances][1] == "failed"
    assert "planted failure" in (rebalances[1].reason or "")
    assert "failed" not in [rebalance.result for rebalance in (rebalances[0], *rebalances[2:])]
    # One request at a time: each of the 40 passes has a token, unless an endpoint had emptied the window.
    assert all((rebalance.tokens or 0) >= 40 * 4 for rebalance in rebalances)
    assert len(list(tmp_path.glob("expert_distribution_recorder_*.pt"))) == 2
    assert "EPLB plans on this record" in log.read_text()


def test_per_token_recording_and_dummy_weights_survive_rebalances(models: Path, tmp_path: Path, port: int) -> None:
    flags = ["--tp", "2", "--ep", "2", "--enable-eplb", "--eplb-algorithm", "deepseek", "--load-format", "dummy"]
    flags += ["--ep-num-redundant-experts", "4", "--eplb-rebalance-num-iterations", "10"]
    flags += ["--expert-distribution-recorder-buffer-size", "10", "--expert-distribution-recorder-mode", "per_token"]
    log = tmp_path / "log"
    with serve(models / "qwen3moe", flags, log, port=port, ranks=2) as server:
        assert all(len(result["output_ids"]) == 30 for result in server.generate(prompts(8), tokens=30))
    assert log.read_text().count("rebalance end") >= 2


def test_utilization_threshold_works_off_cuda(models: Path, tmp_path: Path, port: int) -> None:
    flags = ["--tp", "2", "--ep", "2", "--enable-eplb", "--eplb-algorithm", "deepseek"]
    flags += ["--eplb-rebalance-num-iterations", "10", "--expert-distribution-recorder-buffer-size", "10"]
    old = importlib.metadata.version("sglang") == "0.5.17"
    metrics = ["--enable-expert-distribution-metrics"] if old else ["--expert-balancedness-report-mode", "server_log"]
    flags += [*metrics, "--eplb-min-rebalancing-utilization-threshold", "0.99"]
    log = tmp_path / "log"
    with serve(models / "qwen3moe", flags, log, port=port, ranks=2) as server:
        assert all(len(result["output_ids"]) == 30 for result in server.generate(prompts(8), tokens=30))
    text = log.read_text()
    assert "rebalance end" in text and "Expert Balancedness" in text


def test_patched_sglang_serves_without_the_package(models: Path, tmp_path: Path, port: int) -> None:
    hidden = (str(HERE / "without_package"),)
    flags = ["--tp", "2", "--ep", "2", "--enable-eplb", "--eplb-rebalance-num-iterations", "10"]
    flags += ["--expert-distribution-recorder-buffer-size", "10"]
    log = tmp_path / "log"
    with serve(models / "qwen3moe", flags, log, port=port, ranks=2, python_path=hidden, cwd=tmp_path) as server:
        assert all(len(result["output_ids"]) == 30 for result in server.generate(prompts(4), tokens=30))
    text = log.read_text()
    assert "rebalance end" in text and "[eplb-affinity]" not in text


def test_without_the_package_its_flag_is_refused(models: Path, tmp_path: Path) -> None:
    environment = {**os.environ, **cpu_environment(2)}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE / "without_package"), environment["PYTHONPATH"]])
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(models / "qwen3moe")]
    command += ["--device", "cpu", "--tp", "2", "--ep", "2", "--eplb-algorithm", "affinity"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "needs the package sglang_eplb_affinity" in done.stderr.strip().splitlines()[-1]
