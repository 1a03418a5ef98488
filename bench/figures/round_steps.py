"""Where the time goes that rounds beside serving cost those who decode: a scheduler's decode steps by what a round was
doing meanwhile, from the server's log.

    python -m bench.figures.round_steps results/RUN/server/async-needless.log ...

Each of SGLang's decode lines says the mean step since the line before. Steps are fitted to the part of that time in
which a round gathered its window, planned, moved weights, or waited for the last commits (least squares), so a phase
may be shorter than the time between two lines; `--decode-log-interval 4` resolves phases of some ten steps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import click
import numpy as np

from bench.figures.rebalance_log import round_records
from bench.figures.server_log import decode_periods, unix_time
from sglang_eplb_affinity.domain.errors import InputError

PHASES = ("gather", "plan", "move", "end")  # of round_state.RoundState.record
_OUTLIER = 3.0  # times the median step: the server was paused meanwhile


@dataclass(frozen=True)
class PhaseCost:
    """``share`` of the time that was looked at; ``extra_ms``: how much longer a step takes in that phase, with its
    standard error; ``loss_pct`` of all steps together."""

    phase: str
    share: float
    extra_ms: float
    error_ms: float
    loss_pct: float


@dataclass(frozen=True)
class RoundSteps:
    """``base_ms``: a step outside rounds. ``rounds`` and ``lines`` that this is of."""

    base_ms: float
    rounds: int
    lines: int
    phases: tuple[PhaseCost, ...]


def round_steps(text: str) -> RoundSteps:
    """Raises InputError where a log has no asynchronous rounds, or too few decode lines for what is asked."""
    spans = _phases(text)
    periods = decode_periods(text)
    most = max((period.running for period in periods), default=0)
    kept = [period for period in periods if period.running == most and period.end > period.begin]
    middle = float(np.median([period.step_ms for period in kept])) if kept else 0.0
    kept = [period for period in kept if period.step_ms < _OUTLIER * middle]
    if not spans or len(kept) <= len(PHASES) + 1:
        raise InputError(
            f"{len(spans)} asynchronous rounds and {len(kept)} decode lines of {most} requests: too few "
            "(times need milliseconds)"
        )
    begin, end = np.array([(period.begin, period.end) for period in kept]).T
    parts = np.zeros((len(kept), len(PHASES)))
    for phases in spans:
        for column, (start, stop) in enumerate(phases):
            parts[:, column] += np.clip(np.minimum(end, stop) - np.maximum(begin, start), 0, None) / (end - begin)
    steps = np.array([period.step_ms for period in kept])
    seen = [column for column in range(len(PHASES)) if parts[:, column].any()]
    design = np.column_stack([np.ones(len(steps)), parts[:, seen]])
    found, _, rank, _ = np.linalg.lstsq(design, steps, rcond=None)
    spread = float(((steps - design @ found) ** 2).sum()) / max(len(steps) - rank, 1)
    errors = np.sqrt(np.diag(np.linalg.pinv(design.T @ design)) * spread)
    time = (end - begin) / (end - begin).sum()
    base, costs = float(found[0]), []
    for place, column in enumerate(seen, start=1):
        share = float(parts[:, column] @ time)
        costs.append(
            PhaseCost(
                PHASES[column], share, float(found[place]), float(errors[place]), 100 * share * found[place] / base
            )
        )
    return RoundSteps(base, len(spans), len(steps), tuple(costs))


def _phases(text: str) -> list[tuple[tuple[float, float], ...]]:
    """Unix times of the phases of each asynchronous round that moved weights, which is logged when it is over."""
    found = []
    for time, record in round_records(text):
        lasted = [float(record[f"{phase}_seconds"]) for phase in PHASES if f"{phase}_seconds" in record]
        if time is not None and record.get("mode") == "asynchronous" and len(lasted) == len(PHASES):
            began = unix_time(time) - sum(lasted)
            found.append(tuple(pairwise(accumulate(lasted, initial=began))))
    return found


def table(costs: RoundSteps) -> str:
    """Markdown."""
    lines = [
        f"A step outside rounds: {costs.base_ms:.2f} ms ({costs.lines} lines, {costs.rounds} rounds)", "",
        "| phase of a round | part of the time | a step is longer by | loss |", "|---|---:|---:|---:|",
    ]  # fmt: skip
    for cost in costs.phases:
        extra = f"{cost.extra_ms:.2f} ms (± {2 * cost.error_ms:.2f})"
        lines.append(f"| {cost.phase} | {100 * cost.share:.1f} % | {extra} | {cost.loss_pct:.2f} % |")
    return "\n".join(lines)


@click.command()
@click.argument("logs", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(logs: Sequence[Path]) -> None:
    """What each phase of asynchronous rounds costs a decode step, from server logs."""
    for log in logs:
        try:
            found = round_steps(log.read_text(encoding="utf-8", errors="replace"))
        except InputError as error:
            click.echo(f"error: {log}: {error}", err=True)
            sys.exit(2)
        click.echo(f"{log}\n{table(found)}\n")


if __name__ == "__main__":
    main()
