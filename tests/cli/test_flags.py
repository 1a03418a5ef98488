"""Flags that no number can be, or that do not go together: one line with the flag and its value, nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from sglang_eplb_affinity.cli import cli
from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.dispatch.losses import without_gpus
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.domain.topology import Topology
from tests.simulate.conftest import SYSTEM

EXPERTS = 16
PLAN = "plan --trace t.npz --effort fast --gpus 4 --nodes 2 --out out.json "
AUTO = PLAN + "--redundant auto --memory-gb 1 --expert-mb 10 "
TOY = "--trace t.npz --topology toy.yaml --layers 1 --resamples 2 --phase prefill "
DAY = "replay --trace t.npz --topology toy.yaml --layers 1 --windows 4 "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flags")
    scores = np.random.default_rng(0).gumbel(size=(200, 3, EXPERTS)) + np.linspace(0, 2, EXPERTS)
    RoutingTrace(np.argsort(-scores, axis=-1)[..., :4].astype(np.int16), EXPERTS).save(path / "t.npz")
    ExpertMap.contiguous(3, EXPERTS, 24).save(path / "m8.json")
    ExpertMap.contiguous(3, EXPERTS, 18).save(path / "m2.json")
    (path / "toy.yaml").write_text(SYSTEM)
    return path


def run(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.chdir(folder)
    return CliRunner().invoke(cli, line.split())


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (AUTO.replace("-gb 1", "-gb inf"), "'inf' is not a finite number"),
        (AUTO.replace("-gb 1", "-gb nan"), "'nan' is not a finite number"),
        (AUTO.replace("-gb 1", "-gb 0"), "--memory-gb and --expert-mb, both above 0; --memory-gb is 0"),
        (AUTO.replace("--expert-mb 10", ""), "both above 0; --expert-mb is not given"),
        (AUTO + "--algorithm deepseek", "--redundant auto: needs --algorithm affinity, not deepseek"),
        (AUTO + "--current-map m8.json", "--redundant auto: chooses the slots, but those of --current-map m8.json are"),
        (PLAN + "--redundant 8 --memory-gb 1", "--memory-gb 1: only with --redundant auto, not 8"),
        (
            PLAN + "--redundant 2",
            "--redundant 2: with 16 experts this makes 18 slots, which do not divide evenly over 4",
        ),
        (
            PLAN + "--redundant 4 --current-map m8.json",
            "m8.json: has 24 slots, but 16 experts with --redundant 4 are 20",
        ),
        (PLAN + "--current-map m2.json", "m2.json: has 18 slots, which do not divide evenly over 4 GPUs"),
        (PLAN + "--load-noise-allowance inf", "'inf' is not a finite number"),
        (PLAN + "--max-load-increase nan", "'nan' is not a finite number"),
        (PLAN + "--max-load-increase -1", "--max-load-increase -1.0: must be 0 or more"),
        (PLAN + "--threads 0", "--threads 0: must be at least 1"),
        (PLAN + "--seed 99999999999999999999", "99999999999999999999 is not in the range"),
        (PLAN + "--seed -1", "-1 is not in the range"),
        (PLAN + "--prefill-share 0.5", "--prefill-share 0.5: needs --objective mixed"),
        (PLAN + "--report out.json", "--report out.json: is the file of --out too"),
        (PLAN + "--algorithm deepseek --survive rank --redundant 4", "--survive: needs --algorithm affinity, not deep"),
        (
            PLAN + "--algorithm deepseek --p95-allowance 0.1",
            "--p95-allowance: needs --algorithm affinity, not deepseek",
        ),
        (PLAN + "--algorithm deepseek_hierarchical --current-map m8.json --redundant 8", "--current-map: needs --algo"),
        (PLAN + "--survive rank", "--survive rank: no expert is on two GPUs without redundant experts"),
        (PLAN + "--nodes 1 --survive node --redundant 8", "--survive node: needs two nodes or more, but --nodes is 1"),
        (PLAN + "--gpus 1 --nodes 1 --survive rank", "--survive rank: needs two GPUs or more, but --gpus is 1"),
        (
            PLAN + "--survive rank --redundant 8 --current-map m8.json --max-moves 1",
            "--survive rank: with --max-moves 1 the plan may not make the replicas",
        ),
        ("evaluate --trace t.npz --map m2.json --gpus 4", "m2.json: has 18 slots, which do not divide evenly over 4"),
        ("inspect --map m2.json --gpus 4", "m2.json: has 18 slots, which do not divide evenly over 4 GPUs"),
        ("simulate --redundant 3 " + TOY, "--redundant 3: with 16 experts this makes 19 slots, which do not divide"),
        ("simulate --redundant -1 " + TOY, "--redundant -1: must be 0 to 112"),
        ("simulate --gpus 8,4 --redundant 64 " + TOY, "--redundant 64: must be 0 to 48"),
        ("simulate --seed -1 " + TOY, "-1 is not in the range"),
        ("simulate --child-spread nan " + TOY, "'nan' is not a finite number"),
        ("recommend --gpus 0 " + TOY, "--gpus 0: must be at least 1"),
        ("recommend --min-gain nan " + TOY, "'nan' is not a finite number"),
        ("recommend --memory-gb auto --plot out.jpg " + TOY, "--plot out.jpg: must end in .png"),
        (DAY + "--gpus -8", "--gpus -8: must be at least 1"),
        (DAY + "--gpus 0", "--gpus 0: must be at least 1"),
        (DAY + "--redundant 100000", "--redundant 100000: must be 0 to 112"),
        (DAY + "--min-gain nan", "'nan' is not a finite number"),
    ],
)
def test_what_cannot_be_meant_is_one_line(line: str, told: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(folder.iterdir())
    done = run(line, folder, monkeypatch)
    assert isinstance(done.exception, SystemExit | InputError) and done.exit_code != 0, done.output
    said = done.output.splitlines()[-1] if isinstance(done.exception, SystemExit) else str(done.exception)
    assert told in said and "\n" not in said
    assert sorted(folder.iterdir()) == before


def test_as_much_memory_as_there_is_gives_every_expert_everywhere_to_choose(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(AUTO.replace("-gb 1", "-gb 1e300").replace("out.json", "big.json"), folder, monkeypatch)
    assert done.exit_code == 0 and "   48 redundant" in done.output, done.output


def test_what_is_left_without_a_gpu_is_chosen_by_pass_as_all_of_it_is() -> None:
    """A GPU that holds no expert of any token: the rest is all there was, by every rule, pass by pass."""
    scores = np.random.default_rng(1).gumbel(size=(240, 1, 6))
    tokens = np.argsort(-scores, axis=-1)[..., :2].astype(np.int16)
    source = np.arange(240) % 3
    trace = RoutingTrace(tokens, 7, sequence=source)
    row = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 4, 6, 6, 6]], np.int32)  # GPU 3 holds expert 6 only
    expert_map, topology = ExpertMap(row, 7), Topology(4)
    for pass_tokens in (4, 30, None):
        whole = measure(
            tokens.transpose(1, 0, 2), expert_map, topology, "cover_balanced", source.astype(np.int32),
            pass_tokens=pass_tokens,
        )  # fmt: skip
        rest = without_gpus(trace, expert_map, topology, "cover_balanced", [3], pass_tokens=pass_tokens)
        assert rest.rest_gpu_fanout == whole.gpu_fanout and rest.tokens_hit == 0
        assert rest.rest_load_max_over_mean * 4 == pytest.approx(whole.load_max_over_mean * 3)
