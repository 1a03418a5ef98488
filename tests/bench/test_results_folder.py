"""What of measurements is kept in the repository."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_results_are_light_and_hold_nothing_that_make_report_makes() -> None:
    listed = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a checkout of git")
    files = [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    assert sum(file.stat().st_size for file in files) < 6_000_000
    assert not [file for file in files if file.suffix in (".html", ".ipynb", ".parquet", ".log")]
    for run in (ROOT / "results").glob("*/run.json"):
        assert {"store.jsonl", "table.md", "cells.csv", "environment.json"} <= {
            file.name for file in run.parent.iterdir()
        }
