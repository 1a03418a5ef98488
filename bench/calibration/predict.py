"""What the time model says of a profile's runs before they are measured, and beside what was measured.

python -m bench.calibration.predict --profile h200-x4-auto --link emulated25   # results/simulate/predicted-*.csv
python -m bench.calibration.predict --beside results/h200-x4-auto-emulated25   # errors of steps and of gains
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pandas as pd

from bench.calibration.served import STAGES, ServedModel
from bench.figures.compare import compare
from bench.harness.arms import ARMS, arms_named
from bench.harness.engine import CACHE, ROOT, prepare_engine
from bench.harness.environment import now, provenance
from bench.harness.links import Link, with_link
from bench.harness.profile import REQUESTS, Profile
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.static_maps import write_maps
from bench.publish.table import tidy
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically

KEYS = ["load", "concurrency", "arm", "metric"]
BASELINE = "vanilla"
PREDICTED = ROOT / "results" / "simulate"


def predict(profile: Profile, arms: tuple[str, ...], loads: tuple[str, ...], maps: Path) -> pd.DataFrame:
    """One row for each load, concurrency, arm and metric; plans the maps that are not in the folder ``maps``."""
    model = prepare_engine(profile.server).model
    served = ServedModel(profile, model, write_maps(profile.server, arms, model, maps))
    rows = []
    for name in loads:
        load = profile.load_named(name)
        if load.kind == REQUESTS and load.request_rate:
            continue  # what arrives at a rate has no closed loop
        for level in load.concurrency:
            for arm in arms:
                for metric, tokens, value, of in served.of_load(load, level, arm):
                    row = {"load": name, "concurrency": level, "arm": arm, "metric": metric}
                    row |= {"tokens_per_gpu": tokens, "predicted": round(value, 3)}
                    if of is not None:
                        row |= {stage: round(us, 1) for stage, us in zip(STAGES, of.stages, strict=True)}
                        row |= {"link_us": round(of.link_us, 1), "gpu_fanout": round(of.gpu_fanout, 3)}
                    rows.append(row)
    frame = pd.DataFrame(rows)
    base = frame[frame["arm"] == BASELINE].set_index(["load", "concurrency", "metric"])["predicted"]
    of_rows = frame.set_index(["load", "concurrency", "metric"]).index
    frame["ratio_to_vanilla"] = (frame["predicted"].to_numpy() / base.reindex(of_rows).to_numpy()).round(4)
    return frame


def beside(predicted: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Predicted and measured rows of ``frame`` (the tidy table) with ``error_pct`` of the value, and of the ratio to
    vanilla, in points of a per cent; ``lower`` and ``upper`` are the measured ratio's interval."""
    found = []
    for (load, metric), rows in predicted.groupby(["load", "metric"], sort=False):
        own = frame[(frame["load"] == load) & frame["valid"]]
        if metric not in own:
            continue
        medians = own.groupby(["concurrency", "arm"])[metric].median().dropna()
        ratios = compare(own, BASELINE, [metric]).set_index(["concurrency", "arm"])
        for row in rows.to_dict("records"):
            key = (row["concurrency"], row["arm"])
            if key not in medians:
                continue
            measured = float(medians[key])
            new = {**{name: row[name] for name in KEYS}, "predicted": row["predicted"], "measured": round(measured, 3)}
            new |= {"error_pct": round(100 * (row["predicted"] / measured - 1), 1)}
            if key in ratios.index:
                ratio = ratios.loc[key]
                new |= {"predicted_ratio": row["ratio_to_vanilla"], "measured_ratio": round(float(ratio["ratio"]), 4)}
                new |= {name: round(float(ratio[name]), 4) for name in ("lower", "upper")}
                new["gain_error_points"] = round(100 * (new["measured_ratio"] - row["ratio_to_vanilla"]), 1)
            found.append(new)
    return pd.DataFrame(found)


def file_of(profile: Profile) -> Path:
    return PREDICTED / f"predicted-{profile.name}-{Link.of(profile).name}.csv"


def read_prediction(path: Path) -> pd.DataFrame:
    """Raises InputError for a file that :func:`write_prediction` did not write."""
    try:
        frame = pd.read_csv(path, comment="#", dtype={"load": str, "arm": str}, keep_default_na=True)
        return frame.fillna({"load": ""})[[*KEYS, "predicted", "ratio_to_vanilla"]]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: not a prediction ({str(error).splitlines()[0]})") from None


def write_prediction(frame: pd.DataFrame, path: Path, command: str) -> None:
    of = provenance()
    head = f"# Simulated: {command}, {now()}, commit {of['commit']}"
    head += " with uncommitted changes\n" if of["uncommitted_changes"] else "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (head + frame.to_csv(index=False)).encode())


@dataclass(frozen=True)
class Errors:
    """Largest and median absolute errors, of times in per cent and of gains in points of a per cent."""

    steps: tuple[float, float]
    gains: tuple[float, float]

    @staticmethod
    def of(table: pd.DataFrame) -> Errors:
        def spread(column: str) -> tuple[float, float]:
            values = table[column].abs().dropna() if column in table else pd.Series(dtype=float)
            return (float(values.max()), float(values.median())) if len(values) else (np.nan, np.nan)

        return Errors(spread("error_pct"), spread("gain_error_points"))


def _run(folder: Path, prediction: str | None) -> None:
    run = RunFolder(folder)
    plan = run.plan()
    if prediction is None:
        maps = folder / "maps" if (folder / "maps").is_dir() else _maps(plan.profile)
        predicted = predict(plan.profile, plan.arms, plan.loads, maps)
    else:
        predicted = read_prediction(Path(prediction))
    table = beside(predicted, _measured(run, plan))
    if table.empty:
        raise InputError(f"{folder}: no row that counts is of a load, concurrency and arm that was predicted")
    click.echo(table.to_string(index=False, na_rep=""))
    errors = Errors.of(table)
    click.echo(f"\nerror of times: median {errors.steps[1]:.1f} %, largest {errors.steps[0]:.1f} %")
    click.echo(f"error of gains over vanilla: median {errors.gains[1]:.1f} points, largest {errors.gains[0]:.1f}")


def _measured(run: RunFolder, plan: RunPlan) -> pd.DataFrame:
    latest = run.store.latest()
    return tidy(latest[cell] for cell in plan.cells() if cell in latest)


def _maps(profile: Profile) -> Path:
    return CACHE / "predicted" / f"{profile.name}-{Link.of(profile).name}"


@click.command(context_settings={"show_default": True})
@click.option("--profile", "profile_name", help="One with a plan_trace.")
@click.option("--link", default="", help="As of `bench run`: nvlink, or emulatedN.")
@click.option("--arms", help="Comma-separated. Default: the profile's.")
@click.option("--maps", type=click.Path(path_type=Path), help="Folder of maps that are there already.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: results/simulate/predicted-PROFILE-LINK.csv.")
@click.option("--beside", "run", type=click.Path(path_type=Path), help="results/RUN: errors of the prediction.")
@click.option("--prediction", help="With --beside: the file that was written before. Default: predict anew.")
def main(
    profile_name: str | None, link: str, arms: str | None, maps: Path | None, out: Path | None, run: Path | None,
    prediction: str | None,
) -> None:  # fmt: skip
    """Predict the rows of a profile's run, or show the prediction beside a run's rows."""
    try:
        if run is not None:
            return _run(run, prediction)
        if profile_name is None:
            raise InputError("--profile: name one to predict, or a run with --beside")
        profile = with_link(Profile.named(profile_name), link)
        names = tuple(a.name for a in arms_named([a.strip() for a in arms.split(",")] if arms else profile.arms))
        frame = predict(profile, names, ("", *profile.loads), maps or _maps(profile))
        command = f"python -m bench.calibration.predict --profile {profile_name}"
        command += (f" --link {link}" if link else "") + (f" --arms {arms}" if arms else "")
        write_prediction(frame, target := out or file_of(profile), command)
        shown = frame.assign(arm=[ARMS[arm].title for arm in frame["arm"]])
        click.echo(shown.drop(columns=["tokens_per_gpu"]).to_string(index=False, na_rep=""))
        click.echo(f"written: {target}", err=True)
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
