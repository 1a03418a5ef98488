"""Fit the constants of sglang_eplb_affinity.simulate.calibration and compare them with every source.

    python -m bench.calibration.calibrate [--write]
        --measured results/deepep/h200-x2.json --measured results/deepep/h200-x4.json
        --measured results/deepep/h200-x2-v2.json

Errors are logarithms of the time, so that small and large messages count alike; the sum of their fourth powers is made
small, which punishes the worst points. Each source is
split into points that are fitted and points that only check; the largest error on the latter is the figure reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml
from scipy.optimize import least_squares

from bench.calibration.measured import engine_us, load_measured, measured_points, v2_engine_us
from bench.calibration.published import Point, published_points
from bench.harness.engine import ROOT
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.simulate.calibration import PhaseConstants, phase_time

TARGET = ROOT / "sglang_eplb_affinity" / "simulate" / "data" / "calibrations.yaml"
H800, H200, GB200 = "h800-cx7", "h200-cx7", "gb200-nvl72"
MEASURED = "h200"  # NVLink's part of H200: from points of h200-x2, h200-x4, all fitted together
# GB/s in one direction, and the share of it that a GPU can take in. Neither two nor four GPUs load the link (at most
# 256 GB/s seen): an assumption.
H200_NVLINK, WIRE_SHARE = 450.0, 0.85
SHARES = np.linspace(0.0, 1.0, 11)

# Which constants each source can tell apart; all others keep their defaults.
FREE: dict[tuple[str, str], tuple[str, ...]] = {
    (H800, "normal"): ("nvlink_gb_per_s", "rdma_gb_per_s"),
    (H800, "low_latency"): ("base_us", "nvlink_gb_per_s", "rdma_gb_per_s"),
    (GB200, "normal"): ("per_peer_us", "nvlink_gb_per_s"),
    (MEASURED, "normal"): (
        "base_us",
        "per_peer_us",
        "fill_tokens",
        "nvlink_gb_per_s",
        "source_gb_per_s",
        "per_token_ns",
        "per_copy_ns",
        "channel_gb_per_s",
        "channel_copy_ns",
        "channel_buffer_copies",
    ),
    (MEASURED, "low_latency"): ("base_us", "nvlink_gb_per_s", "channel_gb_per_s"),
    (MEASURED, "v2"): (
        "base_us",
        "per_row_us",
        "nvlink_gb_per_s",
        "source_gb_per_s",
        "per_token_ns",
        "per_copy_ns",
    ),
}
START = {
    "base_us": 30.0, "nvlink_gb_per_s": 200.0, "rdma_gb_per_s": 45.0, "per_peer_us": 3.0, "source_gb_per_s": 900.0,
    "per_token_ns": 10.0, "per_copy_ns": 10.0, "fill_tokens": 30.0, "channel_gb_per_s": 800.0, "channel_copy_ns": 10.0,
    "channel_buffer_copies": 100.0, "per_row_us": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    point: Point
    predicted_us: float

    @property
    def error_pct(self) -> float:
        return 100 * (self.predicted_us / self.point.us - 1)


def fit_phase(points: Sequence[Point], free: Sequence[str], **fixed: float) -> PhaseConstants:
    """Constants named in ``free`` from the points marked ``fit``; the others as ``fixed``, or their defaults."""
    used = [point for point in points if point.fit]
    if len(used) < len(free):
        raise InputError(f"{points[0].key}: {len(used)} points to fit, but {len(free)} constants need as many")

    def constants(x: np.ndarray) -> PhaseConstants:
        return PhaseConstants(**{"base_us": 0.0, **fixed, **dict(zip(free, np.exp(x).tolist(), strict=True))})

    def residual(x: np.ndarray) -> np.ndarray:
        made = constants(x)
        error = np.log([phase_time(made, point.load).us / point.us for point in used])
        return np.asarray(np.sign(error) * error**2)

    start = np.log([START[name] for name in free])
    found = least_squares(residual, start, bounds=(np.log(1e-3), np.log(1e5)), method="trf")
    rounded = {name: float(f"{value:.4g}") for name, value in zip(free, np.exp(found.x).tolist(), strict=True)}
    return PhaseConstants(**{"base_us": 0.0, **fixed, **rounded})


def compare(points: Sequence[Point], constants: PhaseConstants) -> list[Comparison]:
    return [Comparison(point, phase_time(constants, point.load).us) for point in points]


def fit_all(measured: Sequence[dict[str, Any]]) -> tuple[dict[str, dict[str, PhaseConstants]], list[Comparison]]:
    """Constants by calibration and "mode.phase", and the comparison with every point.

    ``measured``: results of `python -m bench.micro.deepep`, each on other numbers of GPUs; none: published tables only.
    """
    fitted: dict[str, dict[str, PhaseConstants]] = {}
    rows: list[Comparison] = []
    if measured:
        for key in (f"{mode}.{phase}" for mode in ("normal", "low_latency", "v2") for phase in ("dispatch", "combine")):
            found = _fit_measured(measured, key)
            if found is not None:
                fitted.setdefault(MEASURED, {})[key] = found[0]
                rows += found[1]
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in published_points():
        groups.setdefault((point.calibration, point.key), []).append(point)
    for (name, key), points in groups.items():
        # The published normal-mode tables have large messages only: the latency of small ones is the measured one.
        same = fitted.get(MEASURED, {}).get(key)
        base_us = same.base_us if same is not None and key.startswith("normal") else 0.0
        constants = fit_phase(points, FREE[name, key.split(".")[0]], base_us=base_us)
        fitted.setdefault(name, {})[key] = constants
        rows += compare(points, constants)
    return fitted, rows


def _fit_measured(measured: Sequence[dict[str, Any]], key: str) -> tuple[PhaseConstants, list[Comparison]] | None:
    """The share of local copies is found by trying: it enters before the maximum over links."""
    best: tuple[float, PhaseConstants, list[Comparison]] | None = None
    normal = not key.startswith("low_latency")
    for local in SHARES.tolist():
        # A channel of low-latency mode serves an expert, on whichever GPU.
        of_channels = local if normal else 1.0
        points = [point for data in measured for point in measured_points(data, key, local, of_channels)]
        if not points:
            return None
        wire = WIRE_SHARE * H200_NVLINK if normal else 0.0
        constants = fit_phase(points, FREE[MEASURED, key.split(".")[0]], wire_gb_per_s=wire)
        constants = dataclasses.replace(
            constants, local_share=round(local, 2), channel_local_share=round(of_channels, 2)
        )
        rows = compare(points, constants)
        cost = float(np.sum([np.log(r.predicted_us / r.point.us) ** 4 for r in rows if r.point.fit]))
        if best is None or cost < best[0]:
            best = (cost, constants, rows)
    assert best is not None
    return best[1], best[2]


def calibrations(
    fitted: dict[str, dict[str, PhaseConstants]],
    sources: dict[str, list[str]],
    engine_us: float,
    v2_engine: float = 0.0,
) -> dict[str, Any]:
    """The content of calibrations.yaml. ``h200-cx7`` joins the measured NVLink with the published RDMA part."""
    out: dict[str, Any] = {}
    of_v2 = {key: constants for key, constants in fitted.get(MEASURED, {}).items() if key.startswith("v2")}

    def entry(name: str, nvlink: float, rdma: float, phases: dict[str, PhaseConstants], of: Sequence[str]) -> None:
        used = sorted({source for source_name in of for source in sources.get(source_name, [])})
        phases = {**phases, "normal.dispatch": dataclasses.replace(phases["normal.dispatch"], engine_us=engine_us)}
        for key, constants in of_v2.items():
            found = assumed_v2(constants, phases[key.replace("v2", "low_latency")], fitted[H800], key, nvlink)
            phases[key] = dataclasses.replace(found, engine_us=v2_engine) if key == "v2.dispatch" else found
        plain = {key: dataclasses.asdict(value) for key, value in sorted(phases.items())}
        out[name] = {"nvlink_gb_per_s": nvlink, "rdma_gb_per_s": rdma, "sources": used, "phases": plain}

    hosts = sorted(name for name in sources if name.startswith(f"{MEASURED}-x"))
    entry(H800, 200.0, 50.0, fitted[H800], [H800, *hosts])
    if MEASURED in fitted:
        joined = {}
        for key, constants in fitted[MEASURED].items():
            if key in of_v2:
                continue
            rdma = fitted[H800][key]
            extra = max(0.0, rdma.base_us - constants.base_us) if key.startswith("low_latency") else 0.0
            joined[key] = dataclasses.replace(constants, rdma_gb_per_s=rdma.rdma_gb_per_s, rdma_base_us=round(extra, 2))
        entry(H200, H200_NVLINK, 50.0, joined, [*hosts, H800])
        latency = {k: v for k, v in joined.items() if k.startswith("low_latency")}
        entry(GB200, 900.0, 50.0, {**_with_rdma(fitted[GB200], fitted[H800]), **latency}, [GB200, *hosts, H800])
    return out


def assumed_v2(
    measured: PhaseConstants, low_latency: PhaseConstants, h800: dict[str, PhaseConstants], key: str, nvlink: float
) -> PhaseConstants:
    """DeepEP V2 beyond the one host of two H200 on which it was measured: an assumption.

    Rates in proportion to the link; over RDMA (impls/hybrid_{dispatch,combine}.cuh: one copy for each scale-out rank)
    normal mode's rate, and the latency of low-latency mode after that of one NVLink hop.
    """
    scale = nvlink / H200_NVLINK
    normal = h800[key.replace("v2", "normal")]
    return dataclasses.replace(
        measured,
        nvlink_gb_per_s=float(f"{measured.nvlink_gb_per_s * scale:.4g}"),
        source_gb_per_s=float(f"{measured.source_gb_per_s * scale:.4g}"),
        wire_gb_per_s=measured.wire_gb_per_s * scale,
        rdma_gb_per_s=normal.rdma_gb_per_s,
        rdma_base_us=round(low_latency.base_us + low_latency.rdma_base_us, 2),
    )


def _with_rdma(phases: dict[str, PhaseConstants], rdma: dict[str, PhaseConstants]) -> dict[str, PhaseConstants]:
    return {key: dataclasses.replace(value, rdma_gb_per_s=rdma[key].rdma_gb_per_s) for key, value in phases.items()}


def largest_error(rows: Sequence[Comparison], name: str | None = None) -> float:
    """Largest absolute error in % on the points that were not fitted, those of DeepEP V2 left out: its combine is known
    on some sizes only."""
    used = [row for row in rows if not row.point.fit and not row.point.key.startswith("v2")]
    return max(abs(row.error_pct) for row in used if name in (None, row.point.calibration))


def comparison_table(rows: Sequence[Comparison]) -> str:
    """Markdown, one line a point."""
    lines = ["| hardware | phase | point | measured us | model us | error | |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        point = row.point
        role = "fitted" if point.fit else "**checked**"
        lines.append(
            f"| {point.calibration} | {point.key} | {point.label} | {point.us:.0f} | {row.predicted_us:.0f} "
            f"| {row.error_pct:+.1f} % | {role} |"
        )
    return "\n".join(lines)


def summary_table(rows: Sequence[Comparison]) -> str:
    """Markdown, one line for each hardware and phase: how many points, and the errors on those that only check."""
    head = "| hardware | phase | fitted | checked | median error | largest error | worst checked point |"
    lines = [head, "|" + "---|" * 7]
    for name, key in dict.fromkeys((row.point.calibration, row.point.key) for row in rows):
        part = [row for row in rows if (row.point.calibration, row.point.key) == (name, key)]
        checked = sorted((row for row in part if not row.point.fit), key=lambda row: abs(row.error_pct))
        errors = [abs(row.error_pct) for row in checked]
        lines.append(
            f"| {name} | {key} | {len(part) - len(checked)} | {len(checked)} | {np.median(errors):.1f} % "
            f"| {errors[-1]:.1f} % | {checked[-1].point.label} |"
        )
    return "\n".join(lines)


@click.command()
@click.option(
    "--measured", type=click.Path(), multiple=True, help="Result of `python -m bench.micro.deepep`; once for each host."
)
@click.option("--write", is_flag=True, help="Write data/calibrations.yaml.")
@click.option("--table", is_flag=True, help="Print every point as a Markdown table.")
def main(measured: tuple[str, ...], write: bool, table: bool) -> None:
    """Fit the time model and print its errors on the points that were not fitted."""
    try:
        data = [load_measured(Path(path)) for path in measured]
        fitted, rows = fit_all(data)
        if table:
            click.echo(comparison_table(rows) + "\n")
        for name in dict.fromkeys(row.point.calibration for row in rows):
            for key in dict.fromkeys(row.point.key for row in rows if row.point.calibration == name):
                part = [row for row in rows if (row.point.calibration, row.point.key) == (name, key)]
                constants = fitted[name if name in fitted else MEASURED][key]
                checked = [abs(row.error_pct) for row in part if not row.point.fit]
                click.echo(
                    f"{name} {key}: {len(part) - len(checked)} points fitted, {len(checked)} checked, "
                    f"median error {np.median(checked):.1f} %, largest {max(checked):.1f} %; "
                    + ", ".join(f"{k}={v:g}" for k, v in dataclasses.asdict(constants).items() if v)
                )
        click.echo(f"largest error on points that were not fitted: {largest_error(rows):.1f} %")
        if write:
            if not data:
                raise InputError("--write: needs --measured, for the constants of h200-cx7 and gb200-nvl72")
            engine, v2_engine = round(engine_us(data), 2), round(v2_engine_us(data), 2)
            sources: dict[str, list[str]] = {}
            for row in rows:
                sources.setdefault(row.point.calibration, []).append(row.point.source)
            text = "# Written by python -m bench.calibration.calibrate; do not edit.\n"
            text += yaml.safe_dump(calibrations(fitted, sources, engine, v2_engine), sort_keys=False, width=120)
            write_atomically(TARGET, text.encode())
            click.echo(f"{TARGET.name} written")
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
