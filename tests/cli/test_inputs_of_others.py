"""Files that other people have: each is answered right, or refused in one line that names what differs."""

from __future__ import annotations

import base64
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from sglang_eplb_affinity.cli import cli
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.maps import save_map
from sglang_eplb_affinity.simulate.routing_model import draw_like, fit_layer
from tests.planner.windows import skewed_tokens

LAYERS, EXPERTS, K = 3, 16, 4


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=True)


def refusal(*args: object) -> str:
    result = run(*args)
    assert isinstance(result.exception, InputError), (result.output, result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture
def tokens() -> np.ndarray:
    """int16 [layers, tokens, k]."""
    return skewed_tokens(np.random.default_rng(3), LAYERS, 300, EXPERTS, K)


@pytest.fixture
def trace(tmp_path: Path, tokens: np.ndarray) -> Path:
    RoutingTrace(np.ascontiguousarray(tokens.transpose(1, 0, 2)), EXPERTS).save(tmp_path / "trace.npz")
    return tmp_path / "trace.npz"


def ascend(devices: list[list[int]], layer_ids: tuple[int, ...] = (0, 1, 2), **device: Any) -> dict[str, Any]:
    entries = [{"device_id": i, "device_expert": held, **device} for i, held in enumerate(devices)]
    return {
        "moe_layer_count": len(layer_ids),
        "layer_list": [{"layer_id": n, "device_count": len(devices), "device_list": entries} for n in layer_ids],
    }


def uneven() -> dict[str, Any]:
    return ascend([list(range(12)), list(range(12, 16))])


BAD_MAPS = [
    (uneven(), "layer 0 device 1 holds 4 experts, but layer 0 device 0 holds 12"),
    (ascend([list(range(8)), list(range(8, 16))], device_id=0), "layer 0 device_list has device_id 0 twice"),
    (ascend([list(range(8)), list(range(8, 16))], (0, 1, 1)), "layer_list has layer_id 1 twice"),
    ({"physical_to_logical_map": [list(range(16)), [*range(16), 0]]}, "layer 1 has 17 slots, but layer 0 has 16"),
]


@pytest.mark.parametrize(("data", "told"), BAD_MAPS)
def test_maps_that_cannot_be_what_they_say_are_refused_by_every_command(
    trace: Path, tmp_path: Path, data: dict[str, Any], told: str
) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(data))
    out = tmp_path / "out.json"
    for command in (
        ("evaluate", "--trace", trace, "--map", path, "--gpus", 2),
        ("inspect", "--map", path),
        ("convert", "--in", path, "--to", "sglang", "--out", out),
        ("plan", "--trace", trace, "--current-map", path, "--gpus", 2, "--out", out),
    ):
        assert told in refusal(*command), command
        assert not out.exists()


def test_a_map_for_another_number_of_gpus_is_refused(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    save_map(ExpertMap.contiguous(LAYERS, EXPERTS, EXPERTS), path, "vllm-ascend", Topology(8))
    for command in (
        ("evaluate", "--trace", trace, "--map", path, "--gpus", 4),
        ("inspect", "--map", path, "--gpus", 4),
    ):
        assert "is a map for 8 GPUs (devices), not for 4" in refusal(*command)


def dump(path: Path, counts: Any) -> Path:
    path.write_text(json.dumps({"logical_count": counts}))
    return path


def test_counts_as_json_gzip_frequencies_and_per_pass(tmp_path: Path, tokens: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    counts = np.stack([np.bincount(layer.ravel(), minlength=EXPERTS) for layer in tokens])
    start = ExpertMap.contiguous(LAYERS, EXPERTS, EXPERTS)
    start.save(tmp_path / "map.json")
    plain = dump(tmp_path / "counts.json", [counts.tolist()])
    packed = tmp_path / "counts.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    frequencies = dump(tmp_path / "frequencies.json", (counts / counts.sum(1, keepdims=True)).tolist())
    hundredths = dump(tmp_path / "hundredths.json", (counts / 100).tolist())
    half = tmp_path / "half.pt"
    torch.save({"logical_count": torch.from_numpy(counts).to(torch.bfloat16)[None]}, half)
    passes = tmp_path / "passes.pt"
    records = [
        {"rank": 0, "gatherer_key": "primary", "global_physical_count": torch.from_numpy(part)}
        for part in (counts // 2, counts - counts // 2)
    ]
    in_force = torch.from_numpy(start.physical_to_logical)
    torch.save({"records": records, "last_physical_to_logical_map": in_force}, passes)
    load = counts.reshape(LAYERS, 4, -1).sum(2)
    expected = (load.max(1) / load.mean(1)).mean()
    for path in (plain, packed, frequencies, hundredths, half, passes):
        result = run("evaluate", "--dump", path, "--map", tmp_path / "map.json", "--gpus", 4, "--format", "json")
        found = json.loads(result.stdout)
        assert found["load_max_over_mean"] == pytest.approx(expected, rel=2e-3), path
        assert found["gpu_fanout"] is None and "counts only" in result.stderr
        assert ("scaled" in result.stderr) == (path in (frequencies, hundredths))
        planned = run("plan", "--dump", path, "--gpus", 4, "--effort", "fast", "--out", tmp_path / "out.json")
        assert planned.exit_code == 0 and "GPU fan-out unknown (counts only)" in planned.stderr
        assert "counts only" in run("inspect", "--dump", path, "--gpus", 4).stdout


@pytest.mark.parametrize(("value", "told"), [("NaN", "must be numbers"), ("-1", "must be 0 or more")])
def test_counts_that_are_no_counts_are_refused(tmp_path: Path, value: str, told: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(f'{{"logical_count": [[1, 2], [3, {value}]]}}')
    for command in ("plan", "inspect"):
        rest = () if command == "inspect" else ("--gpus", 2, "--out", tmp_path / "o.json")
        message = refusal(command, "--dump", path, *rest)
        assert "logical_count[1, 1] is" in message and told in message


def test_dense_layers_mean_the_same_in_every_command(trace: Path, tmp_path: Path) -> None:
    whole, moe, yaml, device = (tmp_path / name for name in ("whole.json", "moe.json", "m.yaml", "device.json"))
    plan = ("plan", "--trace", trace, "--gpus", 4, "--effort", "fast", "--redundant", 4)
    assert run(*plan, "--out", moe).exit_code == 0
    assert run(*plan, "--dense-layers", 2, "--out", whole).exit_code == 0
    rows = ExpertMap.load(whole).physical_to_logical
    assert len(rows) == LAYERS + 2 and (rows[2:] == ExpertMap.load(moe).physical_to_logical).all()
    for target, out in (("tensorrt-llm", yaml), ("vllm-ascend", device)):
        assert (
            run("convert", "--in", whole, "--to", target, "--gpus", 4, "--dense-layers", 2, "--out", out).exit_code == 0
        )
    added = tmp_path / "added.json"
    convert = ("convert", "--in", moe, "--to", "sglang", "--in-layers", "moe", "--dense-layers", 2, "--out", added)
    assert "5 layers (the first 2 dense)" in run(*convert).stderr
    assert (ExpertMap.load(added).physical_to_logical == rows).all()
    evaluate = ("evaluate", "--trace", trace, "--gpus", 4, "--format", "json")
    expected = json.loads(run(*evaluate, "--map", moe).stdout)["gpu_fanout"]
    for path in (whole, yaml, device, added, moe):
        text = run(*evaluate, "--map", path, "--current-map", whole, "--dense-layers", 2).stdout
        assert json.loads(text)["gpu_fanout"] == expected and json.loads(text)["moved_experts"] == 0
    assert "--dense-layers 2" in refusal(*evaluate, "--map", whole)
    assert "5 layers" in run("inspect", "--map", yaml, "--dense-layers", 2).stdout
    assert run(*plan, "--current-map", whole, "--dense-layers", 2, "--out", added).exit_code == 0
    for command in ("plan", "evaluate", "convert", "inspect", "simulate", "recommend"):
        assert "Leading dense layers of the model (3 for DeepSeek-V3)" in " ".join(
            run(command, "--help").output.split()
        )


def test_several_dumps_are_weighed_by_their_tokens(tmp_path: Path) -> None:
    ExpertMap.contiguous(1, 4, 4).save(tmp_path / "map.json")
    small, large = dump(tmp_path / "small.json", [[10, 0, 0, 0]]), dump(tmp_path / "large.json", [[0, 0, 45, 45]])
    result = run("evaluate", "--dump", small, "--dump", large, "--map", tmp_path / "map.json", "--gpus", 2,
                 "--format", "json")  # fmt: skip
    rows = {row["trace"]: row["per_layer"]["gpu_load"] for row in json.loads(result.stdout)["results"]}
    assert rows["all 2 dumps"] == [[10, 90]]
    assert "most in" in result.stderr and "small.json layer 0: 90.0 %" in result.stderr


def save(path: Path, **arrays: Any) -> Path:
    ids = np.array([[[0, 1]], [[2, 3]]], np.int16)
    np.savez(path, **{"topk_ids": ids, "num_experts": 4, **arrays})
    return path


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"topk_ids": np.array([[[0, 1]], [[2, 2]]], np.int16)}, "topk_ids[1, 0] has expert 2 twice"),
        ({"domain": np.array(["code", "text"])}, "domain holds <U4"),
        (
            {"domain": np.array([0, 5], np.int8), "domain_names": np.array(["a"])},
            "domain holds 5, but domain_names has 1",
        ),
    ],
)
def test_traces_that_cannot_be_are_refused(tmp_path: Path, arrays: dict[str, Any], told: str) -> None:
    path = save(tmp_path / "trace.npz", **arrays)
    for command in (("plan", "--gpus", 2, "--out", tmp_path / "o.json"), ("inspect",),
                    ("simulate", "--topology", "qwen3-235b-h200")):  # fmt: skip
        assert told in refusal(command[0], "--trace", path, *command[1:])


def test_a_bare_array_and_one_token(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 2), np.int16))
    assert "one bare array (.npy)" in refusal("inspect", "--trace", tmp_path / "x.npy")
    one = save(tmp_path / "one.npz", topk_ids=np.array([[[0, 1]]], np.int16))
    for command in ("simulate", "recommend"):
        assert "the plan half is empty" in refusal(command, "--trace", one, "--topology", "qwen3-235b-h200")


def test_max_moves_makes_plans_incremental(trace: Path, tmp_path: Path) -> None:
    message = refusal("plan", "--trace", trace, "--gpus", 4, "--max-moves", 1, "--out", tmp_path / "o.json")
    assert message.startswith("--max-moves 1: makes the plan incremental") and "--current-map" in message


def test_routing_that_one_expert_takes_nearly_all_of_is_drawn_from_in_seconds() -> None:
    rng = np.random.default_rng(0)
    ids = np.where(rng.random(4000) < 0.999, 3, rng.integers(0, 16, 4000))[:, None]
    drawn = draw_like(fit_layer(ids, 16), np.arange(2000), 8, seed=1)
    assert all(len(set(row)) == 8 for row in drawn.tolist()) and drawn.min() >= 0 and drawn.max() < 16
    assert (drawn == 3).any(1).mean() > 0.98


def test_inspect_counts_fan_out_and_load_by_hand(tmp_path: Path) -> None:
    trace = save(tmp_path / "trace.npz", topk_ids=np.array([[[0, 1]], [[1, 2]], [[0, 3]]], np.int16))
    ExpertMap.contiguous(1, 4, 4).save(tmp_path / "map.json")
    args = ("inspect", "--trace", trace, "--map", tmp_path / "map.json", "--gpus", 2)
    layer = json.loads(run(*args, "--format", "json").stdout)["per_layer"][0]
    assert layer["gpu_fanout_tokens"] == [0, 1, 2] and layer["gpu_load"] == [4, 2]
    assert layer["expert_load"] == [2, 2, 1, 1]
    assert layer["coactivation"][0] == {"experts": [0, 1], "tokens": 1, "lift": 0.75}
    text = run(*args).stdout
    assert "max/mean 1.333" in text and "2 GPUs" in text and "66.7 %" in text


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def npy(ids: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, ids)
    return b64(buffer.getvalue())


@pytest.mark.parametrize("kind", ["generate", "openai", "vllm lists", "vllm npy"])
def test_responses_become_a_trace(tmp_path: Path, tokens: np.ndarray, kind: str) -> None:
    ids = tokens[:, :10].transpose(1, 0, 2)  # 6 of the prompt, 5 of the completion but its last
    with_dense = np.concatenate([np.zeros((10, 1, K), np.int64), ids], axis=1).astype("<i4")
    usage = {"prompt_tokens": 6, "completion_tokens": 5}
    coded = b64(np.ascontiguousarray(with_dense).tobytes())
    response: dict[str, Any] = {
        "generate": {"meta_info": {"routed_experts": coded, **usage}},
        "openai": {"sglext": {"routed_experts": coded}, "usage": usage},
        "vllm lists": {
            "prompt_routed_experts": with_dense[:6].tolist(),
            "choices": [{"routed_experts": with_dense[6:].tolist()}],
        },
        "vllm npy": {"choices": [{"routed_experts": npy(with_dense.astype(np.uint8))}]},
    }[kind]
    source, out = tmp_path / "responses.jsonl", tmp_path / "trace.npz"
    source.write_text(f"{json.dumps(response)}\n{json.dumps(response)}\n")
    args = ("convert", "--in", source, "--to", "trace", "--experts", EXPERTS, "--dense-layers", 1, "--out", out)
    if not kind.startswith("vllm"):
        assert "give --top-k" in refusal(*args)
    result = run(*args, "--top-k", K)
    assert result.exit_code == 0, result.exception
    read = RoutingTrace.load(out)
    assert (read.topk_ids == np.concatenate([ids, ids])).all()
    assert read.sequence is not None and read.sequence.tolist() == [0] * 10 + [1] * 10
    source.write_text("{}\n")
    assert "no response holds routed_experts" in refusal(*args)
