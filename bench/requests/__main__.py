"""`python -m bench.requests`: is it worth routing requests to the ranks that hold their experts? (simulated)"""

from __future__ import annotations

import json
from pathlib import Path

import click
import pandas as pd
from tqdm import tqdm

from bench.harness.environment import describe_environment
from bench.harness.output_paths import ResultFolder, write_result
from bench.requests.joint import Search
from bench.requests.report import entries, write_tables
from bench.requests.study import Case, CaseStudy, cases_for
from bench.requests.workload import StudyTraces
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.simulate.system import load_system, preset_names

_out = click.option(
    "--out", type=ResultFolder(), default="results/requests", show_default=True, help="Folder for results."
)


@click.group()
def main() -> None:
    """Requests dealt to ranks by their experts: an offline study on recorded traces. All times are simulated."""


@main.command()
@click.option("--trace", required=True, help="FILE (split by sequence), or PLAN,TEST.")
@click.option("--topology", required=True, help=f"Sizes: YAML file, or a preset: {', '.join(preset_names())}.")
@click.option("--case", "labels", multiple=True, help="Only this one, such as 8x2+8 (GPUs x nodes + redundant).")
@click.option("--search/--no-search", default=True, show_default=True, help="Also place and route together.")
@_out
def run(trace: str, topology: str, labels: tuple[str, ...], search: bool, out: Path) -> None:
    """One trace, all cases: some minutes on 2 cores. Results are written after each case."""
    traces, system = StudyTraces.load(trace), load_system(topology)
    cases = cases_for(traces.plan.trace.num_experts)
    chosen = [_parsed(label) for label in labels] if labels else cases
    rows = []
    file = out / f"{traces.name}.csv"
    out.mkdir(parents=True, exist_ok=True)
    # The traces of others are not in the repository: their names, not this machine's folders, are kept.
    names = ",".join(Path(part).name for part in trace.split(","))
    command = ["python", "-m", "bench.requests", "run", "--trace", names, "--topology", topology]
    command += [part for label in labels for part in ("--case", label)] + ([] if search else ["--no-search"])
    environment = describe_environment(command)
    about = {
        **environment, "system": system.name, "plan_requests": len(traces.plan), "test_requests": len(traces.test),
        "pseudo_requests": traces.pseudo,
    }  # fmt: skip
    write_result(out / f"{traces.name}.json", about)
    for case in tqdm(chosen, desc=traces.name, unit="case", disable=None):
        rows += list(CaseStudy(traces, case, system, Search() if search else None).rows())
        write_atomically(file, pd.DataFrame(rows).round(4).to_csv(index=False).encode())
    click.echo(f"{file}: {len(rows)} rows")


@main.command()
@_out
def report(out: Path) -> None:
    """Tables of the results beside them, and entries for `bench summary add`."""
    write_result(out / "summary_entries.json", {"entries": entries(out)})
    write_tables(out)
    click.echo(json.dumps({e["name"]: e["value"] for e in entries(out)}))


def _parsed(label: str) -> Case:
    try:
        gpus, rest = label.split("x")
        nodes, redundant = rest.split("+")
        return Case(int(gpus), int(nodes), int(redundant))
    except ValueError:
        raise InputError(f"--case {label}: expected GPUSxNODES+REDUNDANT, such as 8x2+8") from None


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except (InputError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"error: {message}", err=True)
        raise SystemExit(2) from None
