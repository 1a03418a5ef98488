"""Commands for results/summary.json and the tables made from it."""

from __future__ import annotations

from pathlib import Path

import click

from bench.harness.engine import ROOT
from bench.harness.run_folder import RunFolder
from bench.publish.summary import dump_figures, load_figures, merge_figures
from sglang_eplb_affinity.domain.files import write_atomically

SUMMARY = ROOT / "results" / "summary.json"
_summary_option = click.option("--summary", "summary_file", default=str(SUMMARY), help="The summary file.")


@click.group()
def summary() -> None:
    """Headline figures: results/summary.json."""


@summary.command()
@click.argument("files", nargs=-1, required=True)
@_summary_option
def add(files: tuple[str, ...], summary_file: str) -> None:
    """Merge the entries of FILES by name (the newest wins); all are checked before anything is written."""
    target = Path(summary_file)
    figures = load_figures(target) if target.is_file() else []
    for file in files:
        figures = merge_figures(figures, load_figures(Path(file)))
    dump_figures(figures, target)
    click.echo(f"{target}: {len(figures)} entries")


@summary.command("from-run")
@click.argument("folder")
@click.option("--prefix", help="Of the names. Default: bench.LINK, such as bench.nvlink; ep4.bench.LINK on 4 GPUs.")
@click.option("--output", required=True, help="File to write the entries to, for `summary add`.")
def from_run(folder: str, prefix: str | None, output: str) -> None:
    """Write the headline figures of a run (FOLDER: results/RUN) as summary entries."""
    from bench.figures.headline import default_prefix, figures_of_run

    run = RunFolder(Path(folder))
    plan = run.plan()
    figures = figures_of_run(run, plan, prefix or default_prefix(plan))
    dump_figures(figures, Path(output))
    click.echo(f"{output}: {len(figures)} entries")


@summary.command("from-series")
@click.option("--output", required=True, help="File to write the entries to, for `summary add`.")
def from_series(output: str) -> None:
    """Write the size of each patch series as summary entries."""
    from bench.publish.series_size import figures_of_series

    figures = figures_of_series(ROOT / "patches")
    dump_figures(figures, Path(output))
    click.echo(f"{output}: {len(figures)} entries")


@summary.command("from-models")
@click.option("--output", required=True, help="File to write the entries to, for `summary add`.")
def from_models(output: str) -> None:
    """Write how many model classes of the installed SGLang can be served as summary entries."""
    from bench.publish.models_page import figures_of_models

    figures = figures_of_models()
    dump_figures(figures, Path(output))
    click.echo(f"{output}: {len(figures)} entries")


@summary.command()
@_summary_option
def check(summary_file: str) -> None:
    """Validate the summary file."""
    click.echo(f"{summary_file}: {len(load_figures(Path(summary_file)))} entries, all valid")


@click.command()
@click.option("--check", "only_check", is_flag=True, help="Change nothing; exit 1 when a file is out of date.")
@_summary_option
def docs(only_check: bool, summary_file: str) -> None:
    """Make README.md's table and pictures, docs/results.md, docs/flags.md and other generated parts anew."""
    from bench.publish.pages import made_pages

    stale = []
    for path, text in made_pages(load_figures(Path(summary_file))).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if not only_check:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, text.encode())
    if not stale:
        click.echo("all generated documentation is up to date")
    elif only_check:
        click.echo(f"out of date: {', '.join(stale)}; run `python -m bench docs`", err=True)
        raise SystemExit(1)
    else:
        click.echo(f"written: {', '.join(stale)}")
