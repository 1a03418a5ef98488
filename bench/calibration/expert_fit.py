"""Fit the time model's constants of decode's experts to measured times (sglang_eplb_affinity/simulate/expert_time.py).

    python -m bench.calibration.expert_fit [--without SHAPE]

Prints the constants of each type of weights and the largest and median error, with ``--without`` also on the shape that
was left out. The sum of largest and a fifth of the mean error is made small (differential evolution, seeded).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import differential_evolution

from bench.capacity.expert_times import inputs_of, measured
from bench.harness.engine import ROOT
from bench.micro.expert_slots import SHAPES, Case
from sglang_eplb_affinity.simulate.expert_time import MASKED_BF16, MASKED_FP8, MaskedProducts, masked_products_us
from sglang_eplb_affinity.simulate.system import Gpu, Model

# Shares of memory, of an SM's part and of the products; us of a wave of 64 and of 128 rows, and of launches; power.
BOUNDS = ((0.5, 1.0), (0.8, 4.0), (0.3, 1.0), (0.0, 20.0), (0.0, 20.0), (0.0, 12.0), (1.5, 10.0))


def constants(values: np.ndarray, most_columns: int) -> MaskedProducts:
    memory, sm, compute, small, large, launch, power = map(float, values)
    return MaskedProducts(memory, sm, compute, most_columns, (small, large), launch, power)


@dataclass(frozen=True)
class Measured:
    """A case as the time model is asked, and its us."""

    case: Case
    inputs: tuple[np.ndarray, Model, Gpu]
    us: float


def errors(cases: Sequence[Measured], of: MaskedProducts) -> np.ndarray:
    """float64 [cases]: per cent."""
    return np.array([100 * (float(masked_products_us(*case.inputs, of)[0]) / case.us - 1) for case in cases])


def fit(cases: Sequence[Measured], most_columns: int, rounds: int) -> MaskedProducts:
    def cost(values: np.ndarray) -> float:
        error = np.abs(errors(cases, constants(values, most_columns)))
        return float(error.max() + 0.2 * error.mean())

    found = differential_evolution(cost, BOUNDS, seed=1, maxiter=rounds, popsize=10, polish=False)
    return constants(found.x, most_columns)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.calibration.expert_fit", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--without", choices=[shape.name for shape in SHAPES])
    parser.add_argument("--rounds", type=int, default=150)
    options = parser.parse_args(arguments)
    for dtype, served in (("bf16", MASKED_BF16), ("fp8", MASKED_FP8)):
        cases = [Measured(case, inputs_of(case), us) for case, us in measured(ROOT) if case.dtype == dtype]
        fitted = [case for case in cases if case.case.shape != options.without]
        of = fit(fitted, served.most_columns, options.rounds)
        print(f"{dtype}: {of}")
        for name, part in (("fitted", fitted), ("left out", [c for c in cases if c.case.shape == options.without])):
            if part:
                error = np.abs(errors(part, of))
                print(f"  {name}: {len(part)} cases, median {np.median(error):.1f} %, largest {error.max():.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
