import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.harness.engine import ROOT, check_gpus
from bench.harness.profile import Profile
from bench.harness.rehearsal import rehearsal
from sglang_eplb_affinity.domain.errors import InputError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--profile", "no-such-profile"], "no-such-profile"),
        (["--arms", "none,fastest"], "fastest"),
        (["--arms", "none,none"], "twice"),
        (["--arms", ""], "no arm named"),
        (["--concurrency", "1,x"], "1,x"),
        (["--concurrency", "0,4"], "0,4"),
        (["--concurrency", ""], "--concurrency"),
        (["--blocks", "0"], "--blocks"),
        (["--port", "-1"], "--port"),
        (["--sharegpt", "no/such/file.json"], "no/such/file.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, options: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["run", "--results-dir", str(tmp_path), *options])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and said in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("found", "said"), [(0, "sees none"), (1, "sees 1")])
def test_a_gpu_profile_needs_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: int, said: str) -> None:
    monkeypatch.setattr("bench.__main__.check_sglang", lambda: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    result = CliRunner().invoke(main, ["run", "--results-dir", str(tmp_path), "--profile", "h200-x2"])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: --profile h200-x2: needs 2 GPUs") and said in line and "--rehearse" in line
    assert list(tmp_path.iterdir()) == []


def test_gpus_are_counted_by_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    profile = Profile.named("h200-x8")
    with pytest.raises(InputError, match="needs 8 GPUs"):
        check_gpus(profile)
    check_gpus(replace(profile, server=replace(profile.server, other_hosts=("second",))))
    check_gpus(rehearsal(profile))


def test_report_of_a_folder_that_is_no_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "run.json" in result.stderr


def test_profiles_are_listed() -> None:
    result = CliRunner().invoke(main, ["profiles"])
    assert result.exit_code == 0 and "cpu" in result.stdout


def test_measuring_needs_nothing_that_draws() -> None:
    """A GPU host without network has what SGLang needs, and no more."""
    code = "import sys, bench.__main__, bench.harness.client_process; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"pandas", "matplotlib", "jupytext", "nbclient", "nbconvert", "pyarrow"} & set(done.stdout.split())
