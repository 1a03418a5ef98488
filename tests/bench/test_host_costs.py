"""Host costs of recording and asynchronous rebalancing: every step is measured, and bad input refused."""

import json

import pytest

from bench.micro import host_costs


def test_every_step_is_measured(tmp_path, capsys) -> None:
    out = tmp_path / "new" / "costs.json"  # the folder is made
    assert host_costs.main(["--out", str(out), "--repeats", "3"]) == 0
    result = json.loads(out.read_text())
    assert set(result["microseconds"]) == {line.split(":")[0] for line in capsys.readouterr().out.splitlines()}
    assert len(result["microseconds"]) == 7
    assert all(0 < row["p10"] <= row["p50"] <= row["p90"] for row in result["microseconds"].values())


@pytest.mark.parametrize("arguments", [["--repeats", "1"], ["--out", "."]])
def test_bad_input_is_one_line_and_exit_code_2(arguments, tmp_path, capsys) -> None:
    try:
        code = host_costs.main(["--out", str(tmp_path / "costs.json"), *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2 and not list(tmp_path.iterdir())
    assert arguments[1] in capsys.readouterr().err.splitlines()[-1]
