from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench.calibration import calibrate
from bench.calibration.measured import measured_points
from bench.calibration.published import Point, published_points, random_tokens
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.simulate.calibration import (
    LinkBytes,
    PhaseConstants,
    link_bytes,
    load_calibration,
    phase_time,
)
from sglang_eplb_affinity.simulate.traffic import (
    LATENCY_NVLINK_IN,
    LATENCY_NVLINK_OUT,
    NORMAL_FORWARDED,
    NORMAL_RECEIVED,
    NUM_COUNTERS,
)

MEASURED = [Path(__file__).parents[2] / "results" / "deepep" / f"h200-x{gpus}.json" for gpus in (2, 4)]


@pytest.fixture(scope="module")
def published():
    return calibrate.fit_all([])[1]


def test_published_points_that_were_not_fitted_are_within_15_percent(published):
    checked = [row for row in published if not row.point.fit]
    assert len(checked) >= 10
    assert max(abs(row.error_pct) for row in checked) <= 15


def test_every_published_table_has_fitted_and_checked_points():
    points = list(published_points())
    for key in {(p.calibration, p.key) for p in points}:
        roles = {p.fit for p in points if (p.calibration, p.key) == key}
        assert roles == {True, False}
    assert all("github.com" in p.source for p in points)


def test_measured_points_and_stored_constants():
    fitted, rows = calibrate.fit_all([json.loads(path.read_text()) for path in MEASURED])
    assert calibrate.largest_error(rows) <= 15
    stored = load_calibration("h800-cx7").phases["low_latency.dispatch"]
    assert stored == fitted["h800-cx7"]["low_latency.dispatch"]
    stored = load_calibration("h200-cx7").phases["normal.combine"]
    fresh = fitted["h200"]["normal.combine"]
    assert (stored.base_us, stored.nvlink_gb_per_s, stored.local_share) == (
        fresh.base_us, fresh.nvlink_gb_per_s, fresh.local_share,
    )  # fmt: skip


def test_constants_of_v2():
    """At a fan-out of 8 V2 moves what low latency moves; at 1 an eighth of it, and its combine adds up eight rows."""
    for name, nvlink in (("h200-cx7", 450.0), ("gb200-nvl72", 900.0)):
        phases = load_calibration(name).phases
        dispatch, combine, low = phases["v2.dispatch"], phases["v2.combine"], phases["low_latency.dispatch"]
        assert not dispatch.has_channels and dispatch.fill_tokens == 0
        assert dispatch.rdma_base_us == pytest.approx(low.base_us + low.rdma_base_us)
        assert dispatch.wire_gb_per_s == pytest.approx(0.85 * nvlink) and dispatch.engine_us > 0 == combine.engine_us
        assert combine.per_row_us > 4 * dispatch.per_row_us
    counters = np.zeros((NUM_COUNTERS, 8))
    counters[LATENCY_NVLINK_OUT] = counters[LATENCY_NVLINK_IN] = 8 * 128
    counters[NORMAL_RECEIVED] = counters[NORMAL_FORWARDED] = 128
    few = link_bytes(counters, "v2", "dispatch", 100, 128, 7, most_rows=8)
    assert few.nvlink == 128 * 100 and few.most_rows == 8
    assert link_bytes(counters, "low_latency", "dispatch", 100, 128, 7).nvlink == 8 * 128 * 100
    one, eight = (phase_time(combine, dataclasses.replace(few, most_rows=rows)) for rows in (1, 8))
    assert eight.us > one.us and eight.slowest_link == "latency"


def test_measured_points_of_v2_are_near_but_for_its_combine():
    data = json.loads((MEASURED[0].parent / "h200-x2-v2.json").read_text())
    for phase, most, hidden in (("dispatch", 12, (2048, 4096, 7168)), ("combine", 30, (7168,))):
        constants = load_calibration("h200-cx7").phases[f"v2.{phase}"]
        points = measured_points(data, f"v2.{phase}", constants.local_share, constants.channel_local_share)
        rows = calibrate.compare([p for p in points if any(f"hidden {h}," in p.label for h in hidden)], constants)
        assert len(rows) == 110 * len(hidden) and max(abs(row.error_pct) for row in rows) <= most


def test_fit_recovers_known_constants():
    true = PhaseConstants(40.0, 300.0, source_gb_per_s=500.0)
    points = []
    for tokens in (64, 512, 4096):
        for copies in (0.5, 1.0, 2.0):
            load = LinkBytes(tokens * copies * 8192, 0.0, tokens * 8192, 1)
            points.append(Point("x", "normal.dispatch", "", phase_time(true, load).us, load, True, ""))
    found = calibrate.fit_phase(points, ("base_us", "nvlink_gb_per_s", "source_gb_per_s"))
    assert found.base_us == pytest.approx(40, rel=0.01)
    assert found.nvlink_gb_per_s == pytest.approx(300, rel=0.01)
    assert found.source_gb_per_s == pytest.approx(500, rel=0.01)


def busiest(nvlink: float, rdma: float) -> LinkBytes:
    return LinkBytes(nvlink, rdma, 0.0, 7, nvlink_gpu=1, nvlink_direction="into", rdma_gpu=2, rdma_direction="out of")


def test_time_grows_with_bytes_and_names_the_slowest_link():
    constants = PhaseConstants(20.0, 150.0, 45.0)
    small = phase_time(constants, busiest(1e4, 1e3))
    nvlink = phase_time(constants, busiest(1e8, 1e6))
    rdma = phase_time(constants, busiest(1e8, 1e8))
    assert small.us < nvlink.us < rdma.us
    assert small.slowest_link == "latency"
    assert nvlink.slowest_link == "NVLink into GPU 1"
    assert rdma.slowest_link == "RDMA out of GPU 2"
    faster = phase_time(constants, busiest(1e8, 1e8), 1.0, 2.0)
    assert faster.us < rdma.us


def test_rdma_without_bandwidth_is_refused():
    with pytest.raises(InputError, match="rdma_gb_per_s"):
        phase_time(PhaseConstants(20.0, 150.0, 45.0), LinkBytes(1e6, 1e6, 0, 7), 1.0, 0.0)


def test_random_tokens_respect_limited_nodes():
    tokens, source = random_tokens(64, 64, 8, 64, 8, 4)
    nodes = tokens // 8
    assert max(len(set(row)) for row in nodes.tolist()) <= 4
    assert all(len(set(row)) == 8 for row in tokens.tolist())
    np.testing.assert_array_equal(np.bincount(source), np.full(64, 64))


def test_command_refuses_a_file_that_is_no_measurement(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[]")
    result = CliRunner().invoke(calibrate.main, ["--measured", str(path)])
    assert result.exit_code == 2
    assert str(path) in result.output and result.output.count("\n") == 1


def test_constants_are_plain_numbers():
    for name in ("h800-cx7", "h200-cx7", "gb200-nvl72"):
        for constants in load_calibration(name).phases.values():
            assert all(value >= 0 for value in dataclasses.astuple(constants))
