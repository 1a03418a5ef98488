"""The cost of judging a round's maps is measured beside planning, and launches nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.micro import round_costs
from bench.planner.synthetic import synthetic_trace


def test_judging_is_measured_beside_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_costs.RoutingTrace, "load", lambda _: synthetic_trace(768, 2, 32, 4))
    out = tmp_path / "costs.json"
    assert round_costs.main(["--out", str(out), "--repeats", "2"]) == 0
    found = json.loads(out.read_text())
    assert len(found["rounds"]) == 2 and all(row["planning"] > 0 < row["judging"] for row in found["rounds"])
    assert found["torch_operations"] == 0 and found["layers"] == 2
    assert 0 < found["judging_to_planning"]["p50"] < 1


def test_one_repeat_has_no_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        round_costs.main(["--out", str(tmp_path / "costs.json"), "--repeats", "1"])
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    assert "--repeats 1: at least 2" in capsys.readouterr().err
