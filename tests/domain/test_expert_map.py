"""Expert maps and topologies: invariants hold for every valid input and bad input is refused in one line."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology


@st.composite
def expert_maps(draw: st.DrawFn) -> tuple[ExpertMap, int]:
    gpus = draw(st.integers(1, 6))
    per_gpu = draw(st.integers(1, 5))
    slots = gpus * per_gpu
    experts = draw(st.integers(1, slots))
    layers = draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in range(layers):
        row = np.concatenate([np.arange(experts), random.integers(0, experts, slots - experts)])
        rows.append(random.permutation(row))
    return ExpertMap(np.array(rows), experts), gpus


@given(expert_maps())
def test_replica_table_is_the_inverse_of_the_map(case: tuple[ExpertMap, int]) -> None:
    expert_map, _ = case
    table = expert_map.logical_to_all_physical()
    for layer, row in enumerate(expert_map.physical_to_logical):
        for expert in range(expert_map.num_experts):
            slots = [slot for slot in table[layer, expert] if slot >= 0]
            assert slots == np.flatnonzero(row == expert).tolist()
            assert len(slots) == expert_map.replica_counts()[layer, expert]


def test_saved_map_is_read_back(tmp_path) -> None:
    expert_map = ExpertMap(np.array([[0, 1, 2, 0], [2, 1, 0, 1]]), 3)
    expert_map.save(tmp_path / "map.json")
    assert json.loads((tmp_path / "map.json").read_text()) == {"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 1]]}
    assert (ExpertMap.load(tmp_path / "map.json").physical_to_logical == expert_map.physical_to_logical).all()
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]


@pytest.mark.parametrize(
    ("ids", "experts", "message"),
    [
        ([[0, 1, 1]], 3, "layer 0 has no replica of logical expert 2"),
        ([[0, 1], [0, 5]], 2, "layer 1 slot 1 holds expert 5, but ids must be 0 to 1"),
        ([[0, -1]], 2, "layer 0 slot 1 holds expert -1"),
        ([0, 1], 2, "must be integers of shape [layers, slots]"),
        ([[0.0, 1.0]], 2, "must be integers of shape [layers, slots]"),
    ],
)
def test_wrong_maps_are_refused(ids, experts, message) -> None:
    with pytest.raises(InputError) as error:
        ExpertMap(np.array(ids), experts)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not an expert map"),
        ('{"physical_to_logical_map": [[0, 1], [0]]}', "layer 1 has 1 slots, but layer 0 has 2"),
        ('{"physical_to_logical_map": []}', "integers of shape [layers, slots]"),
    ],
)
def test_wrong_map_files_are_refused_with_their_name(tmp_path, text, message) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        ExpertMap.load(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"nothere\.json: cannot be read"):
        ExpertMap.load(tmp_path / "nothere.json")


@pytest.mark.parametrize(("gpus", "nodes"), [(0, 1), (4, 0), (6, 4)])
def test_impossible_topologies_are_refused(gpus, nodes) -> None:
    with pytest.raises(InputError, match="topology"):
        Topology(gpus, nodes)


def test_slots_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match=r"10 physical experts .* do not divide evenly over 4 GPUs"):
        Topology(4).slots_per_gpu(10)
