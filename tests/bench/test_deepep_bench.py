"""The parts of the DeepEP micro-benchmark that need no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.micro.deepep.__main__ import dry_run, main, parse, settings_of
from bench.micro.deepep.cases import Case, copies, normal_cases, routings, topk_ids
from bench.micro.deepep.timing import summarise
from sglang_eplb_affinity.domain.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("rank", [0, 1])
def test_routing_has_exactly_its_fanout_and_even_load(gpus, rank):
    for routing in routings(gpus):
        case = Case("normal", 2048, "fp8", 512, routing)
        ids = topk_ids(case, rank, gpus, 64, 8)
        local, remote = copies(ids, rank, gpus, 64)
        assert local + remote == pytest.approx(case.fanout)
        assert all(len(set(row)) == 8 for row in ids.tolist())
        if routing == "local":
            assert remote == 0
        elif routing == "remote":
            assert local == 0
        elif routing == "spread":
            load = np.bincount(ids.ravel() // (64 // gpus), minlength=gpus)
            assert load.max() <= 1.05 * load.mean()


def test_payload_of_fp8_counts_its_scales():
    assert Case("normal", 7168, "fp8", 1, "2").bytes_per_copy() == (7168 + 7168 // 128 * 4, 14336)
    assert Case("normal", 7168, "bf16", 1, "2").bytes_per_copy() == (14336, 14336)


def test_first_points_cover_every_size():
    cases = list(normal_cases(2, (7168, 2048), (4096, 256), ("fp8", "bf16")))
    first = {(c.hidden, c.tokens, c.dtype) for c in cases[:16]}
    assert len(first) == 8
    assert len(cases) == len(set(cases))


def test_dry_run_checks_every_point():
    settings = settings_of(parse(["--out", "x.json", "--dry-run", "--gpus", "4"]))
    assert dry_run(settings)["normal"] == len(routings(4)) * 6 * 3 * 2


def test_summary_of_repeats():
    times = np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])
    assert summarise(times) == {"median": 2.5, "p10": 1.5, "p90": 3.5, "repeat_min": 2.0, "repeat_max": 3.0}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--gpus", "3"], "--gpus: 3"),
        (["--gpus", "2", "--experts", "9"], "--experts: 9"),
        (["--iterations", "2"], "--iter"),
    ],
)
def test_bad_settings(arguments, part):
    with pytest.raises(InputError) as error:
        settings_of(parse(["--out", "x.json", "--dry-run", *arguments]))
    assert part in str(error.value)


def test_command_line():
    base = [sys.executable, "-m", "bench.micro.deepep", "--out"]
    done = subprocess.run([*base, "x.json", "--dry-run"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["points"]["normal"] > 100
    done = subprocess.run(
        [*base, "no/dir/x.json", "--gpus", "2"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2 and done.stderr.startswith("error: --out")


@pytest.mark.skipif(torch.cuda.device_count() >= 8, reason="this machine has 8 GPUs")
def test_more_gpus_than_there_are(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "x.json"), "--gpus", "8"]) == 2
    assert "bench.micro.deepep" in (error := capsys.readouterr().err) and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
