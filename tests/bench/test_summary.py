import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.harness.engine import ROOT
from bench.publish.summary import load_figures, merge_figures, parse_figures
from sglang_eplb_affinity.domain.errors import InputError
from tests.bench.sample_figure import FIGURE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Upper.case"),
        ("name", "noprefix"),
        ("value", float("nan")),
        ("value", 2.0),  # outside its interval
        ("value", True),
        ("lower", "1"),
        ("kind", "guessed"),
        ("unit", " "),
        ("versions", {}),
        ("commit", "unknown"),
        ("date", "yesterday"),
        ("command", ""),
    ],
)
def test_an_entry_that_is_wrong_is_refused_by_name_and_field(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        replace(FIGURE, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["missing", "unknown", "twice"])
def test_entries_have_exactly_the_fields_and_unique_names(change: str) -> None:
    entries = [asdict(FIGURE)]
    if change == "missing":
        del entries[0]["commit"]
    elif change == "unknown":
        entries[0]["remark"] = "x"
    else:
        entries *= 2
    with pytest.raises(InputError, match=r"file\.json"):
        parse_figures({"entries": entries}, "file.json")


def test_newest_wins_by_date_not_by_order() -> None:
    newer = replace(FIGURE, value=1.03, date="2026-11-22")
    other = replace(FIGURE, name="a.b")
    assert merge_figures([FIGURE], [newer, other]) == [other, newer]
    assert merge_figures([newer], [FIGURE]) == [newer]
    assert merge_figures([FIGURE], [replace(FIGURE, value=1.01)])[0].value == 1.01


def test_add_merges_files_and_writes_nothing_when_one_is_wrong(tmp_path: Path) -> None:
    target, good, bad = (tmp_path / name for name in ("summary.json", "good.json", "bad.json"))
    good.write_text(json.dumps([asdict(FIGURE)]))
    bad.write_text("[{}]")
    result = CliRunner().invoke(main, ["summary", "add", str(good), str(bad), "--summary", str(target)])
    assert result.exit_code == 2 and not target.exists()
    assert CliRunner().invoke(main, ["summary", "add", str(good), "--summary", str(target)]).exit_code == 0
    assert load_figures(target) == [FIGURE]


def test_entries_of_a_file_are_not_lost_to_others(tmp_path: Path) -> None:
    """As with `summary from-series --output results/summary.json` in place of `summary add`."""
    path = tmp_path / "summary.json"
    path.write_text(json.dumps([asdict(FIGURE), asdict(replace(FIGURE, name="other.figure"))]))
    before = path.read_bytes()
    done = CliRunner().invoke(main, ["summary", "from-series", "--output", str(path)])
    assert done.exit_code == 2 and "has 2 other entries, such as" in done.output
    assert path.read_bytes() == before
    fresh = tmp_path / "series.json"
    for _ in range(2):  # its own file is written anew
        assert CliRunner().invoke(main, ["summary", "from-series", "--output", str(fresh)]).exit_code == 0


def test_the_summary_of_this_repository_is_valid() -> None:
    load_figures(ROOT / "results" / "summary.json")
