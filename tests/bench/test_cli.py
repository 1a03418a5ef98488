import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.engine import ROOT


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


def test_report_of_a_folder_that_is_no_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "run.json" in result.stderr


def test_profiles_are_listed() -> None:
    result = CliRunner().invoke(main, ["profiles"])
    assert result.exit_code == 0 and "cpu" in result.stdout


def test_measuring_needs_nothing_that_draws() -> None:
    """A GPU host without network has what SGLang needs, and no more."""
    code = "import sys, bench.__main__, bench.client_process; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"pandas", "matplotlib", "jupytext", "nbclient", "nbconvert", "pyarrow"} & set(done.stdout.split())
