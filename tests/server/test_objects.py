"""What our hooks make of SGLang's own objects: batches as it cuts them, weights as it loads them."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest

from bench.harness.engine import ROOT, cpu_environment

pytestmark = pytest.mark.skipif(
    importlib.metadata.version("sglang") != "0.5.23", reason="the checks name objects as SGLang 0.5.23 does"
)


@pytest.fixture(scope="module")
def found() -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.check_objects"],
        env={**os.environ, **cpu_environment(1)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-2000:]
    return dict(json.loads(lines[0]))


def test_ranks_that_share_a_pass_sample_its_tokens_evenly(found: dict) -> None:
    """Attention over eight ranks in front of an all-to-all, eager passes and captured ones."""
    parts = found["parts"]
    assert parts["counted every token"] and parts["layers agree"] and parts["rows"] == 1024
    first, expected = parts["first percent"]
    assert first <= 4 * expected + 4
    half, expected_half = parts["first half"]
    assert abs(half - expected_half) < 0.04  # four standard deviations
    assert min(parts["rows of ranks"]) > 80


@pytest.mark.parametrize("way", ["disk", "tensor", "distributed"])
def test_new_weights_go_where_the_model_has_its_experts(found: dict, way: str) -> None:
    """The target's by the map in force; a draft model's in their own order, whatever the target's map says."""
    assert found["draft"][f"target {way}"] == [0, 3, 2]
    assert found["draft"][f"draft {way}"][0] == 3
