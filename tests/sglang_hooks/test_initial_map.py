"""--init-expert-location without a server: formats, dense layers, and what does not fit."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.maps import save_map
from sglang_eplb_affinity.formats.recorded_map import MapOrigin, ServedModel, save_recorded_map
from sglang_eplb_affinity.planner import plan
from sglang_eplb_affinity.sglang_hooks.initial_map import Placement, read_initial_map, warn_of_rule
from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape
from sglang_eplb_affinity.sglang_hooks.settings import Settings
from tests.sglang_hooks.arguments import server_arguments

# A model whose first layer is dense, on 2 GPUs, with 2 redundant experts.
SERVER = Placement(
    ServedModel("org/model", "DeepseekV3ForCausalLM", 3, 4, 2), MoeShape(3, 4, 2, (1, 2)), Topology(2), 6
)
ROWS = np.array([[0, 1, 2, 3, 0, 1], [3, 1, 0, 2, 3, 0], [2, 2, 0, 1, 3, 3]])
MAP = ExpertMap(ROWS, 4)
ORIGIN = MapOrigin(SERVER.model, SERVER.topology, 6, "affinity", "dynamic", 1, "now", "0.5.17", "0.1.0")


def ids(value: str, server: Placement = SERVER) -> np.ndarray:
    found = read_initial_map(value, server)
    assert found.expert_map is not None
    return found.expert_map.physical_to_logical


@pytest.mark.parametrize(("name", "target"), [("a.json", "sglang"), ("a.pt", "sglang"), ("b.json", "vllm-ascend"),
                                              ("c.yaml", "tensorrt-llm")])  # fmt: skip
def test_every_format_gives_the_same_map(tmp_path: Path, name: str, target) -> None:  # type: ignore[no-untyped-def]
    save_map(MAP, tmp_path / name, target, Topology(2), dense_layers=1)
    assert np.array_equal(ids(str(tmp_path / name)), ROWS)


def test_inline_json_and_recorded_map(tmp_path: Path) -> None:
    assert np.array_equal(ids(json.dumps(MAP.to_json())), ROWS)
    save_recorded_map(tmp_path / "map.json", MAP, ORIGIN)
    found = read_initial_map(str(tmp_path / "map.json"), SERVER)
    assert found.origin is not None and found.origin.round == 1


@pytest.mark.parametrize(
    ("served", "redundant", "warned"), [("static", 2, True), ("dynamic", 2, False), ("static", 0, False)]
)
def test_a_map_planned_for_another_replica_choice_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, served: str, redundant: int, warned: bool
) -> None:
    save_recorded_map(tmp_path / "map.json", MAP, ORIGIN)
    settings = Settings.of(server_arguments(ep_dispatch_algorithm=served, ep_num_redundant_experts=redundant))
    warn_of_rule(read_initial_map(str(tmp_path / "map.json"), SERVER), settings)
    expected = "map.json: was planned for --ep-dispatch-algorithm dynamic, but this server chooses replicas by static"
    assert [expected in message for message in caplog.messages] == [True] * warned


def test_moe_layers_that_are_not_in_one_piece(tmp_path: Path) -> None:
    save_map(MAP, tmp_path / "b.json", "vllm-ascend", Topology(2), dense_layers=1)
    found = ids(str(tmp_path / "b.json"), replace(SERVER, shape=MoeShape(4, 4, 2, (1, 3))))
    assert np.array_equal(found[[1, 3]], ROWS[1:])
    assert np.array_equal(found[[0, 2]], ExpertMap.contiguous(2, 4, 6).physical_to_logical)


def test_a_dump_is_planned_from(tmp_path: Path) -> None:
    torch.save({"logical_count": torch.arange(24).reshape(2, 3, 4)}, tmp_path / "dump.pt")
    found = read_initial_map(str(tmp_path / "dump.pt"), SERVER)
    assert found.expert_map is None and found.window is not None
    assert found.window.counts.tolist()[0] == [12, 14, 16, 18]


def test_misfits_are_one_line_that_names_what_differs(tmp_path: Path) -> None:
    recorded, ascend = str(tmp_path / "map.json"), str(tmp_path / "ascend.json")
    save_recorded_map(Path(recorded), MAP, ORIGIN)
    save_map(MAP, ascend, "vllm-ascend", Topology(2), dense_layers=1)
    other = ServedModel("other", "Qwen3MoeForCausalLM", 3, 4, 2)
    cases = [
        (recorded, replace(SERVER, model=other), "recorded for model architecture DeepseekV3ForCausalLM, but"),
        (recorded, replace(SERVER, topology=Topology(6, 2)), "EP size 2, but the server has 6; nodes 1, but the ser"),
        (recorded, replace(SERVER, num_slots=8), "slots 6, but the server has 8"),
        (ascend, replace(SERVER, topology=Topology(3)), "is for EP size 2, but the server has 3"),
        (ascend, replace(SERVER, shape=MoeShape(3, 4, 2, (0, 1, 2))), "has 2 MoE layers of 6 slots, but the model"),
        (ascend, replace(SERVER, num_slots=8), "the model needs 2 MoE layers of 8"),
        (str(tmp_path / "absent.json"), SERVER, "cannot be read"),
        ('{"logical_count": [[1, 2], [3]]}', SERVER, "rows of different length"),
        ("[1]", SERVER, "not an expert map"),
        ("nonsense", SERVER, "nor inline JSON"),
    ]
    for value, server, message in cases:
        with pytest.raises(InputError) as error:
            read_initial_map(value, server)
        assert message in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).startswith(f"--init-expert-location {value}")


def test_a_map_planned_from_a_dump_knows_the_models_expert_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_eplb_affinity.sglang_hooks import loaded_map, process

    class Metadata:
        @staticmethod
        def _init_common(*server_args_and_model_config: object) -> dict[str, object]:
            model = SimpleNamespace(num_logical_experts=4, num_layers=3)
            return {"model_config_for_expert_location": model, "ep_size": 2, "num_physical_experts": 6}

    location = ModuleType("sglang.srt.eplb.expert_location")
    monkeypatch.setattr(location, "ExpertLocationMetadata", Metadata, raising=False)
    context = ModuleType("sglang.srt.runtime_context")
    parallel = SimpleNamespace(elastic_ep_initial_size=None)
    monkeypatch.setattr(context, "get_parallel", lambda: parallel, raising=False)
    for name in ("sglang", "sglang.srt", "sglang.srt.eplb"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (location, context):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(loaded_map, "metadata_of", lambda expert_map, *rest, **more: expert_map)
    monkeypatch.setattr(process, "loaded_map", None)
    seen = []

    def observed_plan(window, topology, slots, config):  # type: ignore[no-untyped-def]
        seen.append(config)
        return plan(window, topology, slots, config)

    monkeypatch.setattr(loaded_map, "plan", observed_plan)
    torch.save({"logical_count": torch.arange(24).reshape(2, 3, 4)}, tmp_path / "dump.pt")
    monkeypatch.setattr(loaded_map, "adapter", lambda: SimpleNamespace(init_common=Metadata._init_common))
    settings = Settings.of(server_arguments(init_expert_location=str(tmp_path / "dump.pt")))
    loaded = loaded_map.load(settings, None, 0)
    assert [config.num_groups for config in seen] == [2]
    assert loaded.physical_to_logical.shape == (3, 6)
