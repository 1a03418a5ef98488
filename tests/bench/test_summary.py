import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.harness.engine import ROOT
from bench.publish.readme_tables import results_table, update_tables
from bench.publish.summary import Figure, load_figures, merge_figures, parse_figures
from sglang_eplb_affinity.domain.errors import InputError

FIGURE = Figure(
    name="bench.cpu.qps_ratio_to_vanilla",
    value=1.02,
    lower=0.98,
    upper=1.06,
    unit="ratio",
    kind="measured",
    hardware="2 cores",
    versions={"sglang": "0.5.17"},
    commit="abcdef1",
    date="2026-11-21",
    command="make bench",
)
TEXT = "# Title\n<!-- results:begin bench.cpu -->\nold\n<!-- results:end bench.cpu -->\nrest\n"


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


def test_table_shows_value_interval_and_kind() -> None:
    table = results_table([FIGURE, replace(FIGURE, name="sim.x", kind="simulated")], "bench")
    assert "| `bench.cpu.qps_ratio_to_vanilla` | 1.02 ratio | 0.98 to 1.06 | measured |" in table
    assert "sim.x" not in table and "sim.x" in results_table([replace(FIGURE, name="sim.x")], "all")


def test_rows_of_equal_metrics_make_one_table() -> None:
    def entry(name: str, kind: str = "measured") -> Figure:
        return replace(FIGURE, name=name, lower=FIGURE.value, upper=FIGURE.value, kind=kind)

    figures = [entry(f"bench.cpu.{arm}.{metric}") for arm in ("a", "b") for metric in ("load", "qps")]
    figures += [entry("bench.cpu.c.load", kind="emulated"), entry("bench.cpu.seconds"), entry("bench.d.load")]
    lines = results_table(figures, "bench").splitlines()
    assert lines[:5] == [
        "| `bench.cpu` | load (ratio) | qps (ratio) |",
        "|---|---:|---:|",
        "| `a` | 1.02 | 1.02 |",
        "| `b` | 1.02 | 1.02 |",
        "| `c` | 1.02, emulated |  |",
    ]
    assert [line.split(" | ")[0] for line in lines if line.startswith("| `bench.")][1:] == [
        "| `bench.cpu.seconds`",
        "| `bench.d.load`",
    ]
    assert lines[-1] == "With `make bench` on 2 cores, 2026-11-21, commit `abcdef1`."


def test_a_prefix_ends_at_a_dot() -> None:
    assert results_table([FIGURE], "bench.cp") == ""
    both = results_table([FIGURE, replace(FIGURE, name="sim.x"), replace(FIGURE, name="other.x")], "sim,bench.cpu")
    assert "sim.x" in both and FIGURE.name in both and "other.x" not in both


def test_tables_are_replaced_between_markers_only_and_stay_when_current() -> None:
    new = update_tables(TEXT, [FIGURE])
    assert "old" not in new and new.startswith("# Title\n") and new.endswith("rest\n")
    assert update_tables(new, [FIGURE]) == new


@pytest.mark.parametrize("wrong", [TEXT.replace("end bench.cpu", "end bench.gpu"), TEXT.split("<!-- results:end")[0]])
def test_a_marker_without_its_partner_is_an_error(wrong: str) -> None:
    with pytest.raises(InputError, match="results:begin"):
        update_tables(wrong, [FIGURE])


def test_add_merges_files_and_writes_nothing_when_one_is_wrong(tmp_path: Path) -> None:
    target, good, bad = (tmp_path / name for name in ("summary.json", "good.json", "bad.json"))
    good.write_text(json.dumps([asdict(FIGURE)]))
    bad.write_text("[{}]")
    result = CliRunner().invoke(main, ["summary", "add", str(good), str(bad), "--summary", str(target)])
    assert result.exit_code == 2 and not target.exists()
    assert CliRunner().invoke(main, ["summary", "add", str(good), "--summary", str(target)]).exit_code == 0
    assert load_figures(target) == [FIGURE]


def test_readme_check_tells_when_tables_differ(tmp_path: Path) -> None:
    readme, target = tmp_path / "README.md", tmp_path / "summary.json"
    readme.write_text(TEXT)
    target.write_text(json.dumps({"entries": [asdict(FIGURE)]}))
    command = ["readme", "--file", str(readme), "--summary", str(target)]
    assert CliRunner().invoke(main, [*command, "--check"]).exit_code == 1
    assert readme.read_text() == TEXT
    assert CliRunner().invoke(main, command).exit_code == 0
    assert CliRunner().invoke(main, [*command, "--check"]).exit_code == 0


def test_the_summary_of_this_repository_is_valid() -> None:
    load_figures(ROOT / "results" / "summary.json")


def test_the_tables_of_the_readme_are_those_of_the_summary() -> None:
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("no README.md in this checkout")
    text = readme.read_text(encoding="utf-8")
    figures = load_figures(ROOT / "results" / "summary.json")
    assert update_tables(text, figures) == text, "run `python -m bench readme`"
