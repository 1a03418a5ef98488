"""Recordings that hold counts and no token sets: what can be said of them is, the rest is one line."""

import csv
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from sglang_eplb_affinity.cli import cli
from sglang_eplb_affinity.domain.errors import InputError


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    """As SGLang's recorder dumps in its mode `stat`."""
    path = tmp_path / "counts.pt"
    torch.save({"rank": 0, "logical_count": torch.tensor([[[5, 1, 1, 1], [1, 2, 3, 4]]])}, path)
    return path


def test_the_knee_of_redundancy_needs_token_sets(counts: Path, tmp_path: Path) -> None:
    budget = ["--redundant", "auto", "--memory-gb", "1", "--expert-mb", "1"]
    arguments = ["plan", "--dump", str(counts), "--gpus", "2", *budget, "--out", str(tmp_path / "map.json")]
    found = CliRunner().invoke(cli, arguments)
    assert isinstance(found.exception, InputError) and "holds counts only; give a number" in str(found.exception)
    assert not (tmp_path / "map.json").exists()


def test_csv_of_counts_alone_before_token_sets(counts: Path, tmp_path: Path) -> None:
    sets = tmp_path / "sets.pt"
    tokens = torch.tensor([[[0, 1], [2, 3], [0, 2]], [[0, 1], [1, 3], [0, 2]]], dtype=torch.int16)
    entry = {
        "version": 1, "counts": torch.tensor([[2, 1, 2, 1], [2, 2, 1, 1]]), "tokens": tokens,
        "coactivation": torch.ones(2, 4, 4, dtype=torch.int64),
    }  # fmt: skip
    torch.save({"rank": 0, "logical_count": entry["counts"][None], "affinity": entry}, sets)
    placed = tmp_path / "map.json"
    placed.write_text(json.dumps({"physical_to_logical_map": [[0, 1, 2, 3], [0, 1, 2, 3]]}))
    arguments = ["evaluate", "--dump", str(counts), "--dump", str(sets), "--map", str(placed), "--gpus", "2"]
    done = CliRunner().invoke(cli, [*arguments, "--format", "csv"], catch_exceptions=False)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("note:")]
    alone, with_tokens, *_ = csv.DictReader(lines)
    assert alone["pass_tokens"] == "" and with_tokens["pass_tokens"] == "1024"
    assert alone["load_max_over_mean"] and float(with_tokens["gpu_fanout"]) >= 1
