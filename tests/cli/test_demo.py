"""What a newcomer runs first."""

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from sglang_eplb_affinity.cli import cli
from sglang_eplb_affinity.cli.demo import DATA, compare
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace


def test_without_a_command_ten_lines_say_what_to_try_first() -> None:
    result = CliRunner().invoke(cli, [])
    assert result.exit_code == 0 and len(result.output.strip().splitlines()) == 10
    assert "python -m sglang_eplb_affinity demo" in result.output
    for name in cli.commands:
        assert name in result.output


def test_demo_plans_compares_and_draws(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["demo", "--out", str(tmp_path / "new")], catch_exceptions=False)
    assert result.exit_code == 0
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")
    none, eplb, ours = compare()
    assert ours.gpu_fanout < 0.85 * eplb.gpu_fanout and ours.load < 1.03 * eplb.load < none.load
    assert f"{ours.gpu_fanout:.2f}" in result.output and f"{eplb.load:.3f}" in result.output
    saved = ExpertMap.from_json(json.loads((tmp_path / "new" / "affinity.json").read_text()), 64)
    assert np.array_equal(saved.physical_to_logical, ours.placed.physical_to_logical)


def test_the_two_parts_of_the_recording_are_different_tokens() -> None:
    one, other = (RoutingTrace.load(DATA / f"demo_{part}.npz") for part in ("plan", "test"))
    assert one.num_tokens == other.num_tokens == 5888
    assert not np.array_equal(one.topk_ids, other.topk_ids)


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(cli, ["demo", "--out", str(tmp_path / "file")])
    assert isinstance(result.exception, InputError) and "--out" in str(result.exception)
