"""A map recorded by one server is loaded by another, with and without EPLB; outputs stay those of no EPLB."""

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.engines.emulated_hosts import EmulatedHosts
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.maps import load_map, save_map
from sglang_eplb_affinity.formats.recorded_map import origin_of
from tests.server.conftest import free_port
from tests.server.harness import NUM_PROMPTS, ServerCase, prompts, serve

REDUNDANT = 4
RECORDING = {
    "qwen3moe": ServerCase("qwen3moe", algorithm="affinity", redundant=REDUNDANT, extra=("--eplb-async",)),
    "dsv3": ServerCase("dsv3", dp_attention=True, algorithm="deepseek", redundant=REDUNDANT),
}


@pytest.fixture(scope="module")
def recorded(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file that a server of this model recorded; each server is started once."""
    files: dict[str, Path] = {}

    def path_of(model: str) -> Path:
        if model not in files:
            folder = tmp_path_factory.mktemp(f"record-{model}")
            path = folder / "map.json"
            case = RECORDING[model]
            flags = [*case.flags, "--eplb-record-map", str(path), "--enable-metrics"]
            with serve(models / model, flags, folder / "log", port=free_port(), ranks=2) as server:
                server.generate_until(lambda: len(lines(server.log, "rebalance")) >= 2 and path.is_file(), NUM_PROMPTS)
                with urllib.request.urlopen(server.url + "/metrics", timeout=60) as response:
                    (folder / "metrics").write_bytes(response.read())
            files[model] = path
        return files[model]

    return path_of


def lines(log: Path, kind: str) -> list[dict[str, Any]]:
    marker = f"[eplb-affinity] {kind} {{"
    found = [line for line in log.read_text(errors="replace").splitlines() if marker in line]
    return [json.loads(line[line.index(marker) + len(marker) - 1 :]) for line in found]


@pytest.mark.parametrize("model", RECORDING)
def test_the_file_is_a_map_and_says_where_it_comes_from(recorded, model: str) -> None:
    path = recorded(model)
    rounds = [line for line in lines(path.with_name("log"), "rebalance") if line["result"] in ("applied", "unchanged")]
    data = json.loads(path.read_text())
    expert_map = load_map(path, num_experts=16)
    origin = origin_of(data, expert_map, str(path))
    assert origin is not None and origin.routing_checksum is not None
    assert (origin.model.num_layers, origin.model.num_experts, origin.model.top_k) == (4, 16, 4)
    assert (origin.topology, origin.num_slots) == (Topology(2), 16 + REDUNDANT)
    assert origin.round == rounds[-1]["round"] and origin.algorithm == RECORDING[model].algorithm
    assert origin.recorded is not None and origin.contiguous is not None
    assert round(origin.recorded.balancedness, 4) == rounds[-1]["balancedness_after"]
    assert round(origin.contiguous.gpu_fanout, 4) == rounds[-1]["gpu_fanout_contiguous"]
    assert list(path.parent.glob(".*.tmp")) == []
    assert not np.array_equal(expert_map.physical_to_logical, ExpertMap.contiguous(4, 16, 20).physical_to_logical)


@pytest.mark.parametrize("model", RECORDING)
def test_metrics_equal_what_the_log_says(recorded, model: str) -> None:
    path = recorded(model)
    rounds = lines(path.with_name("log"), "rebalance")
    text = path.with_name("metrics").read_text()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples
               if s.name.startswith("eplb_affinity_")]  # fmt: skip
    (name,) = {s.labels["model_name"] for s in samples}
    assert Path(name).name == model

    def value(name: str, **labels: str) -> float:
        (found,) = [
            s.value for s in samples if s.name == f"eplb_affinity_{name}" and labels.items() <= s.labels.items()
        ]
        return float(found)

    # A round may have ended between the request and the end of the server.
    done = int(
        sum(value("rebalances_total", result=result) for result in ("applied", "unchanged", "skipped", "failed"))
    )
    assert len(rounds) - 2 <= done <= len(rounds) and done >= 2
    last = rounds[done - 1]
    for name in ("balancedness", "gpu_fanout", "node_fanout", "remote_gpu_copies", "remote_node_copies"):
        for of in ("contiguous", "before", "after"):
            assert round(value(name, map=of), 4) == last[f"{name}_{of}"]
    for name in ("moved_experts", "moved_bytes"):
        assert value(f"{name}_total") == sum(line[name] for line in rounds[:done]) > 0
    assert value("window_tokens") == last["tokens"] and value("relocated_experts") > 0
    assert value("phase_seconds_count", phase="total") == done
    assert value("commit_seconds_count") == sum(len(line.get("commit_ms", ())) for line in rounds[:done])
    assert {line["mode"] for line in rounds} == {"asynchronous" if model == "qwen3moe" else "synchronous"}
    assert value("phase_seconds_sum", phase="total") == pytest.approx(
        sum(r["seconds"] for r in rounds[:done]), abs=1e-2
    )
    assert value("last_commit_timestamp_seconds") <= value("last_round_timestamp_seconds") <= time.time()
    # One process writes them: no label of a process or of a rank.
    assert not any({"pid", "tp_rank"} & set(s.labels) for s in samples)


def test_loaded_without_eplb(recorded, reference, models: Path, tmp_path: Path, port: int) -> None:
    path = recorded("qwen3moe")
    expected = reference("qwen3moe", 2, False)
    flags = ["--tp", "2", "--ep", "2", "--ep-num-redundant-experts", str(REDUNDANT), "--init-expert-location"]
    flags += [str(path), "--enable-expert-affinity-recorder"]
    dumps = {"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(tmp_path)}
    with serve(models / "qwen3moe", flags, tmp_path / "log", port=port, ranks=2, **dumps) as server:
        server.post("/start_expert_distribution_record")
        outputs = [result["output_ids"] for result in server.generate(prompts(NUM_PROMPTS))]
        server.post("/dump_expert_distribution_record")
        loaded, measured = lines(server.log, "map")
    assert outputs == expected
    origin = origin_of(json.loads(path.read_text()), load_map(path, num_experts=16), "map")
    assert origin is not None and origin.recorded is not None
    assert loaded["event"] == "loaded" and loaded["source"] == str(path)
    assert loaded["relocated_experts"] > 0 and loaded["recorded_round"] == origin.round
    assert loaded["balancedness_loaded"] == round(origin.recorded.balancedness, 4)
    assert measured["event"] == "measured" and measured["tokens"] > 0
    assert {"balancedness_contiguous", "balancedness_loaded", "gpu_fanout_loaded"} <= set(measured)


def test_loaded_with_eplb_which_goes_on_from_it(
    recorded, reference, models: Path, tmp_path: Path, port: int, hosts: EmulatedHosts | None
) -> None:
    """Over two hosts, of which only the first has the file."""
    path = recorded("dsv3")
    expected = reference("dsv3", 2, True)
    case = ServerCase("dsv3", dp_attention=True, algorithm="affinity", redundant=REDUNDANT,
                      extra=("--init-expert-location", str(path), "--eplb-affinity-nodes", "1"))  # fmt: skip
    if hosts is not None:
        subprocess.run(hosts.command(1, ["mount", "-t", "tmpfs", "tmpfs", str(path.parent)]), check=True)
    with serve(models / "dsv3", case.flags, tmp_path / "log", port=port, ranks=2, hosts=hosts) as server:
        outputs = [result["output_ids"] for result in server.generate(prompts(NUM_PROMPTS))]
        rounds = lines(server.log, "rebalance")
        loaded, measured = lines(server.log, "map")
    assert outputs == expected
    assert loaded["relocated_experts"] > 0 and any(line["moved_experts"] for line in rounds)
    # The first round found the loaded map in force, with all replicas.
    assert measured["balancedness_loaded"] == rounds[0]["balancedness_before"]
    assert measured["gpu_fanout_contiguous"] == rounds[0]["gpu_fanout_contiguous"]


def test_vllm_ascend_map_of_a_model_with_dense_layers(
    recorded, reference, models: Path, tmp_path: Path, port: int
) -> None:
    path = tmp_path / "ascend.json"
    save_map(load_map(recorded("dsv3"), num_experts=16), path, "vllm-ascend", Topology(2), dense_layers=1)
    assert json.loads(path.read_text())["moe_layer_count"] == 3
    expected = reference("dsv3", 2, True)
    flags = ["--tp", "2", "--ep", "2", "--dp", "2", "--enable-dp-attention", "--ep-num-redundant-experts"]
    flags += [str(REDUNDANT), "--init-expert-location", str(path)]
    with serve(models / "dsv3", flags, tmp_path / "log", port=port, ranks=2) as server:
        outputs = [result["output_ids"] for result in server.generate(prompts(NUM_PROMPTS))]
        (loaded,) = lines(server.log, "map")
    assert outputs == expected
    assert loaded["relocated_layers"] > 0 and loaded["source"] == str(path)
