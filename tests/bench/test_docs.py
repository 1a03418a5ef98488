"""What is made for readers: README.md's table and pictures, docs/results.md, docs/flags.md."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from bench.__main__ import main
from bench.harness.engine import ROOT
from bench.publish.catalogue import OTHER, catalogue
from bench.publish.drawings import gains_drawing
from bench.publish.figure_tables import figure_tables
from bench.publish.flags_page import flags_page, server_flags
from bench.publish.headline_table import headline_rows, headline_table
from bench.publish.pages import made_pages
from bench.publish.result_blocks import update_blocks
from bench.publish.results_page import results_page
from bench.publish.summary import Figure, load_figures
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.sglang_hooks.server_arguments import ADDED
from tests.bench.sample_figure import FIGURE as SAMPLE

FIGURE = replace(
    SAMPLE, name="bench.nvlink.qps_ratio_to_vanilla", hardware="2 x NVIDIA H200 (of 4 in the host), 32 cores"
)
TEXT = "# Title\n<!-- results:begin bench.cpu -->\nold\n<!-- results:end bench.cpu -->\nrest\n"
SUMMARY = ROOT / "results" / "summary.json"
pages = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="no documentation in this checkout")


def figure(name: str, value: float = 0.9, spread: float = 0.01, kind: str = "measured") -> Figure:
    return replace(FIGURE, name=name, value=value, lower=value - spread, upper=value + spread, kind=kind)


@pages
def test_generated_documentation_is_that_of_the_summary_and_the_code() -> None:
    stale = [
        str(p) for p, text in made_pages(load_figures(SUMMARY)).items() if not p.is_file() or p.read_text() != text
    ]
    assert not stale, "run `python -m bench docs`"


@pages
def test_every_link_of_the_documentation_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http", "#")):
                file, _, heading = target.partition("#")
                path = page.parent / file
                assert path.exists(), f"{page.name}: {target}"
                if heading and path.suffix == ".md":
                    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                    assert heading in slugs, f"{page.name}: {target}"


@pages
def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_page_has_every_entry_with_its_kind_and_where_it_comes_from() -> None:
    figures = [*load_figures(SUMMARY), figure("new_kind.of.figure", kind="emulated")]
    page = results_page(figures)
    rows = [line for line in page.splitlines() if line.startswith("| ") and "[^" in line]
    value = re.compile(r" -?[\d,.e-]+( \(\S+ to \S+\))?(, \*\w+\*)? ")
    assert sum(bool(value.fullmatch(cell)) for row in rows for cell in row.split("|")) == len(figures)
    assert f"## {OTHER}" in page and "| new kind, of, figure[^" in page
    assert sum(row.count("*emulated*") for row in rows) == sum(f.kind == "emulated" for f in figures)
    assert sum(row.count("*simulated*") for row in rows) == sum(f.kind == "simulated" for f in figures)
    notes = set(re.findall(r"^\[\^(\d+)\]: ", page, re.MULTILINE))
    assert notes == {note for row in rows for note in re.findall(r"\[\^(\d+)\]", row)}


def test_an_entry_stands_in_the_table_with_the_longest_prefix() -> None:
    tables = {name: catalogue().table_of(name) for name in ("simulate.ep320.seconds", "simulate.other", "simulated.x")}
    assert [table and table.title for table in tables.values()] == ["Simulating", "Clusters", None]


def test_rows_of_equal_metrics_make_one_table() -> None:
    figures = [figure(f"bench.cpu.{arm}.{metric}", 1.0, 0) for arm in ("a", "b") for metric in ("load", "reads")]
    figures += [figure("bench.cpu.c.load", 1.5, 0, "emulated"), figure("bench.cpu.seconds"), figure("bench.d.load")]
    grid, rest = figure_tables(figures, ("bench", "cpu"))
    assert grid.splitlines() == [
        "| | load | reads |",
        "|---|---:|---:|",
        "| a | 1 | 1 |",
        "| b | 1 | 1 |",
        "| c | 1.5, *emulated* |  |",
    ]
    assert rest.splitlines()[2:] == [
        "| time | 0.9 (0.89 to 0.91) | ratio |",
        "| d, load | 0.9 (0.89 to 0.91) | ratio |",
    ]


def test_blocks_are_replaced_between_markers_only_and_stay_when_current() -> None:
    new = update_blocks(TEXT, [replace(FIGURE, name="bench.cpu.seconds")], "page.md")
    assert "old" not in new and "| time | 1.02 (0.98 to 1.06) | ratio |" in new
    assert new.startswith("# Title\n") and new.endswith("rest\n")
    assert update_blocks(new, [replace(FIGURE, name="bench.cpu.seconds")], "page.md") == new
    assert "other" not in update_blocks(TEXT, [figure("bench.cpuother.seconds")], "page.md")  # a prefix ends at a dot


@pytest.mark.parametrize("wrong", [TEXT.replace("end bench.cpu", "end bench.gpu"), TEXT.split("<!-- results:end")[0]])
def test_a_marker_without_its_partner_is_an_error(wrong: str) -> None:
    with pytest.raises(InputError, match=r"page\.md.*results:begin"):
        update_blocks(wrong, [FIGURE], "page.md")


def test_proven_gains_come_first_and_simulated_ones_last() -> None:
    figures = [
        figure("ep4.bench.nvlink.full_prefill_ratio_to_vanilla", 0.96),
        figure("bench.replicas.emulated25.full_prefill_ratio_to_vanilla", 0.85, kind="emulated"),
        figure("bench.nvlink.p50_ttft_ratio_to_vanilla", 1.2, 0.1),
        figure("bench.nvlink.p90_tpot_ratio_to_vanilla", 0.7, 0.4),
        figure("simulate.deepseek_v3_ep32.tpot_gain_pct", 20.0, 1.0, "simulated"),
    ]
    rows = headline_rows(figures)
    assert [(row.verdict, round(row.change), row.kind) for row in rows] == [
        (0, -15, "emulated"),
        (0, -4, "measured"),
        (1, -30, "measured"),
        (2, 20, "measured"),
        (0, -20, "simulated"),
    ]
    assert rows[0].hardware == "2 x H200"
    lines = headline_table(figures).splitlines()
    assert lines[2].endswith("| **−15.0 %** | −16.0 to −14.0 % | emulated, 2 x H200 |")
    assert lines[5].endswith("| +20.0 % | +10.0 to +30.0 % | measured, 2 x H200 |")


def test_nothing_measured_gives_an_empty_table_and_a_picture_that_is_one() -> None:
    assert headline_table([]) == "" and headline_rows([]) == []
    assert ElementTree.fromstring(gains_drawing([])).tag.endswith("svg")
    assert results_page([]).startswith("# Results")


def test_every_flag_of_the_series_and_every_command_has_its_row() -> None:
    for patch in (ROOT / "patches").glob("*/eplb-affinity-flags.patch"):
        if patch.parent.name != "0.5.17":  # whose flags are written in another way
            flags = server_flags(patch.read_text(), str(patch))
            assert {flag.name for flag in flags} == {f"--{name.replace('_', '-')}" for name in ADDED}
    page = flags_page(ROOT)
    assert "| `--eplb-async` | `off` | Rebalance without stopping" in page
    assert "### `plan`" in page and "| `--gpus INTEGER` | required |" in page


def test_a_patch_without_flags_is_an_error() -> None:
    with pytest.raises(InputError, match=r"x\.patch"):
        server_flags("+++ b/file\n+x = 1\n", "x.patch")


def test_check_tells_what_is_out_of_date_and_changes_nothing(tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    summary.write_text('{"entries": []}')
    before = (ROOT / "docs" / "results.md").read_text()
    result = CliRunner().invoke(main, ["docs", "--check", "--summary", str(summary)])
    assert result.exit_code == 1 and "docs/results.md" in result.output
    assert (ROOT / "docs" / "results.md").read_text() == before


def test_labels_of_the_picture_fit_beside_it() -> None:
    assert max(len(headline.label) for headline in catalogue().headlines) <= 76
