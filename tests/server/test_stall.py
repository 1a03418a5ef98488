"""The stall comparison as a smoke check: the same three arms, client and figures as on GPUs, on the CPU engine."""

import json
import subprocess
import sys
from pathlib import Path

from bench.harness.engine import ROOT


def test_three_arms_side_by_side_under_load(tmp_path: Path, port: int) -> None:
    # Several blocks: the first asynchronous round may wait for its planner, which starts beside three servers, for one.
    command = [sys.executable, "-m", "bench.gpu.rebalance_stall", "--cpu", "--out", str(tmp_path), "--blocks", "3"]
    done = subprocess.run([*command, "--port", str(port)], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    measured = {cell["arm"]: cell for cell in result["cells"] if cell["block"] == 0}
    assert set(measured) == {"cpu-none", "cpu-sync", "cpu-async"}
    assert all(cell["completed"] == [2, 2] for cell in measured.values())
    assert set(result["ratios_to_no_rebalancing"]) == {"cpu-sync c4", "cpu-async c4"}
    assert result["rounds"]["cpu-sync"]["upstream_rebalances"] >= 3
    rounds = result["rounds"]["cpu-async"]
    assert rounds["results"]["applied"] >= 3 and "failed" not in rounds["results"]
    assert rounds["commit_ms_per_layer"]["max"] > 0 and rounds["passes"]["p50"] >= 4
