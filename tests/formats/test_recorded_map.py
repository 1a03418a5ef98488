"""Recorded maps: what is written, what is read back, and what does not fit."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.maps import load_map
from sglang_eplb_affinity.formats.recorded_map import MapOrigin, ServedModel, origin_of, save_recorded_map
from sglang_eplb_affinity.rebalance.map_recorder import MapRecorder
from sglang_eplb_affinity.rebalance.round_record import RoundRecord, report

MODEL = ServedModel("org/model", "Qwen3MoeForCausalLM", 2, 4, 2)
FIGURES = MapFigures(0.9, 1.5, 1.25, 0.75, 0.5)
SERVER = MapOrigin(MODEL, Topology(2, 2), 6, "affinity", "dynamic", 0, "", "0.5.17", "0.1.0")
MAP = ExpertMap(np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]]), 4)


def read(path: Path) -> MapOrigin | None:
    return origin_of(json.loads(path.read_text()), load_map(path, num_experts=4), str(path))


def test_a_recorded_map_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    origin = replace(SERVER, round=3, written="2026-11-21T12:00:00+00:00", contiguous=FIGURES, routing_checksum="ab")
    save_recorded_map(path, MAP, origin)
    found = read(path)
    assert found is not None and replace(found, map_checksum="") == origin
    assert np.array_equal(load_map(path).physical_to_logical, MAP.physical_to_logical)


@pytest.mark.parametrize(
    ("model", "topology", "slots", "told"),
    [
        (MODEL, Topology(2, 2), 6, []),
        (replace(MODEL, path="elsewhere"), Topology(2, 2), 6, []),
        (replace(MODEL, architecture="DeepseekV3ForCausalLM"), Topology(2, 2), 6, ["model architecture Qwen3Moe"]),
        (replace(MODEL, num_layers=3, num_experts=8), Topology(2, 2), 10, ["layers 2", "experts 4", "slots 6"]),
        (replace(MODEL, top_k=1), Topology(2, 2), 6, ["experts per token 2, but the server has 1"]),
        (MODEL, Topology(3, 1), 6, ["EP size 2, but the server has 3", "nodes 2, but the server has 1"]),
    ],
)
def test_differences_name_what_does_not_fit(
    model: ServedModel, topology: Topology, slots: int, told: list[str]
) -> None:
    found = SERVER.differences(model, topology, slots)
    assert len(found) == len(told) and all(line.startswith(start) for line, start in zip(found, told, strict=True))


def test_a_map_changed_after_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    save_recorded_map(path, MAP, SERVER)
    data = json.loads(path.read_text())
    data["physical_to_logical_map"][0][4] = 3
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="not the map that was recorded"):
        read(path)
    del data["eplb_affinity"]
    path.write_text(json.dumps(data))
    assert read(path) is None


@pytest.mark.parametrize(
    ("entry", "message"), [({"version": 2}, "of version 2"), ({"version": 1}, "is incomplete"), ([], "of version None")]
)
def test_an_entry_that_cannot_be_read(entry: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        origin_of({"eplb_affinity": entry}, MAP, "file")


def test_rounds_that_planned_nothing_leave_the_file(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    recorder = MapRecorder(path, SERVER)
    recorder.round_finished(RoundRecord("skipped", "affinity", 1), MAP)
    assert not path.exists()
    recorder.round_finished(RoundRecord("applied", "affinity", 2, after=FIGURES, routing_checksum="cd", tokens=7), MAP)
    first = path.read_bytes()
    recorder.round_finished(RoundRecord("failed", "affinity", 3), MAP)
    assert path.read_bytes() == first
    found = read(path)
    assert found is not None and (found.round, found.routing_checksum, found.routing_tokens) == (2, "cd", 7)
    assert found.recorded == FIGURES and found.written.endswith("+00:00")
    # A round that failed half-way has changed the map.
    recorder.round_finished(RoundRecord("failed", "affinity", 4, committed_layers=(0,)), MAP)
    found = read(path)
    assert found is not None and found.round == 4
    assert [file.name for file in tmp_path.iterdir()] == ["map.json"]


def test_a_file_that_cannot_be_written_is_logged_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    report(RoundRecord("applied", "affinity", 1), MAP, [MapRecorder(tmp_path / "absent" / "map.json", SERVER)])
    assert "MapRecorder failed on round 1" in caplog.text and "cannot be written" in caplog.text
