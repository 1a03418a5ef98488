"""Flags are checked at start-up: one line, exit code 2; `--eplb-algorithm affinity` alone is enough."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.harness.engine import ROOT, cpu_environment
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.maps import save_map
from sglang_eplb_affinity.formats.recorded_map import MapOrigin, ServedModel, save_recorded_map

EP2 = ["--tp", "2", "--ep", "2"]
AFFINITY = [*EP2, "--eplb-algorithm", "affinity"]
ASYNC = [*AFFINITY, "--eplb-async"]
REPLICAS = ["--ep-num-redundant-experts", "4"]
FURTHER = [*EP2, "--eplb-algorithm", "affinity", "--ep-dispatch-algorithm", "primary", "--eplb-affinity-further-slots"]
LORA = ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules"]
# SGLang wants its ElasticBuffer to hold a prefill chunk and the largest decode batch; by default it holds 128 tokens.
V2 = ["--moe-a2a-backend", "deepep_v2", "--chunked-prefill-size", "128", "--cuda-graph-max-bs-decode", "64"]
HAS_V2 = importlib.metadata.version("sglang") != "0.5.17"
ELASTIC = ["--moe-a2a-backend", "nixl", "--elastic-ep-backend", "nixl"]
NORMAL = ["--moe-a2a-backend", "deepep", "--deepep-mode", "normal"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maps")

    def map_file(name: str, ids: object) -> None:
        (folder / name).write_text(json.dumps({"physical_to_logical_map": ids}))

    good = np.tile(np.arange(16), (4, 1))
    missing, too_large = good.copy(), good.copy()
    missing[2, 5] = 0
    too_large[1, 3] = 16
    map_file("good.json", good.tolist())
    map_file("missing.json", missing.tolist())
    map_file("range.json", too_large.tolist())
    map_file("layers.json", good[:3].tolist())
    map_file("slots.json", np.hstack([good, good[:, :2]]).tolist())
    (folder / "broken.json").write_text("{")
    model = ServedModel("m", "Qwen3MoeForCausalLM", 4, 16, 4)
    origin = MapOrigin(model, Topology(4, 2), 16, "affinity", "dynamic", 1, "now", "0.5.17", "0.1.0")
    save_recorded_map(folder / "recorded.json", ExpertMap(good, 16), origin)
    save_map(ExpertMap(good, 16), folder / "ascend.json", "vllm-ascend", Topology(2))
    save_map(ExpertMap(good, 16), folder / "ascend4.json", "vllm-ascend", Topology(4))
    torch.save({"logical_count": torch.ones(10, 24, 32, dtype=torch.int32)}, folder / "other.pt")
    return folder


@pytest.fixture(scope="module")
def results(models: Path, files: Path) -> dict[str, dict]:
    """All cases in one process: importing SGLang takes longer than checking flags."""
    cases = {
        "affinity alone": AFFINITY,
        "good map": [*AFFINITY, "--init-expert-location", str(files / "good.json")],
        "unknown": [*EP2, "--enable-eplb", "--eplb-algorithm", "affinty"],
        "no ep": ["--tp", "2", "--eplb-algorithm", "affinity"],
        "divide": [*AFFINITY, "--ep-num-redundant-experts", "3"],
        "too many": [*AFFINITY, "--ep-num-redundant-experts", "18"],
        "nodes": [*AFFINITY, "--eplb-affinity-nodes", "3"],
        "sample": [*AFFINITY, "--expert-affinity-sample-tokens", "0"],
        "increase": [*AFFINITY, "--eplb-affinity-max-load-increase", "-0.5"],
        "increase inf": [*AFFINITY, "--eplb-affinity-max-load-increase", "inf"],
        "p95": [*AFFINITY, "--eplb-affinity-p95-allowance", "-0.1"],
        "p95 inf": [*AFFINITY, "--eplb-affinity-p95-allowance", "inf"],
        "p95 off": [*EP2, "--enable-eplb", "--eplb-algorithm", "deepseek", "--eplb-affinity-p95-allowance", "0.1"],
        "ascend map": [*EP2, "--init-expert-location", str(files / "ascend.json")],
        "ep 1": ["--tp", "2", "--init-expert-location", str(files / "good.json")],
        "record suffix": [*AFFINITY, "--eplb-record-map", str(files / "map.pt")],
        "record folder": [*AFFINITY, "--eplb-record-map", str(files / "absent" / "map.json")],
        "record nothing": [*EP2, "--eplb-record-map", str(files / "map.json")],
        "mode": [*AFFINITY, "--expert-distribution-recorder-mode", "per_token"],
        "async": [*ASYNC, "--expert-affinity-record-last-passes", "200", "--eplb-affinity-max-moves", "2"],
        "async deepseek": [*EP2, "--enable-eplb", "--eplb-algorithm", "deepseek", "--eplb-async"],
        "async warm-up": [*ASYNC, "--eplb-async-warm-up-passes", "-1"],
        "survive": [*AFFINITY, "--ep-num-redundant-experts", "4", "--eplb-affinity-survive", "rank"],
        "survive alone": [*AFFINITY, "--eplb-affinity-survive", "rank"],
        "survive a node": [*AFFINITY, "--ep-num-redundant-experts", "4", "--eplb-affinity-survive", "node"],
        "survive moves": [*AFFINITY, "--eplb-affinity-survive", "rank", "--eplb-affinity-max-moves", "2"],
        "survive off": [*EP2, "--enable-eplb", "--eplb-algorithm", "deepseek", "--eplb-affinity-survive", "rank"],
        "async gain": [*ASYNC, "--eplb-min-gain", "1.5"],
        "gain": [*AFFINITY, "--eplb-min-gain", "0"],
        "gain range": [*AFFINITY, "--eplb-min-gain", "-0.1"],
        "gain off": [*EP2, "--enable-eplb", "--eplb-algorithm", "deepseek", "--eplb-min-gain", "0.1"],
        "async off": [*AFFINITY, "--eplb-async-layers-in-flight", "4"],
        "async without eplb": [*EP2, "--eplb-async"],
        "async algorithm": [*EP2, "--enable-eplb", "--eplb-algorithm", "elasticity_aware", "--eplb-async"],
        "async chunks": [*ASYNC, "--eplb-rebalance-layers-per-chunk", "2"],
        "async threshold": [*ASYNC, "--eplb-min-rebalancing-utilization-threshold", "0.9"],
        "tp and ep": ["--tp", "4", "--ep", "2", "--eplb-algorithm", "affinity"],
        "tp and ep async": ["--tp", "4", "--ep", "2", "--eplb-algorithm", "affinity", "--eplb-async"],
        "pp": [*AFFINITY, "--pp-size", "2"],
        "pp async": [*ASYNC, "--pp-size", "2"],
        "lora": [*AFFINITY, *LORA, "all"],
        "lora map": [*EP2, *LORA, "gate_up_proj", "--init-expert-location", str(files / "good.json")],
        "lora attention": [*AFFINITY, *LORA, "q_proj", "o_proj"],
        "weight cache": [*AFFINITY, "--weight-cache-mode", "client"],
        "memory saver": [*ASYNC, "--enable-memory-saver"],
        "pdmux": [*ASYNC, "--enable-pdmux"],
        "elastic": [*ASYNC, "--elastic-ep-backend", "mooncake"],
        "elastic ranks go": [*AFFINITY, *ELASTIC],
        "elastic ranks come": [*AFFINITY, *ELASTIC, "--max-ep-size", "4"],
        "elastic chunks": [*AFFINITY, *ELASTIC, "--eplb-rebalance-layers-per-chunk", "2"],
        "cover_balanced": [*EP2, "--ep-dispatch-algorithm", "cover_balanced"],
        "primary": [*EP2, "--ep-dispatch-algorithm", "primary"],
        "primary tokens": [*EP2, "--ep-dispatch-algorithm", "cover", "--eplb-affinity-primary-tokens", "64"],
        "primary tokens negative": [*EP2, "--ep-dispatch-algorithm", "primary", "--eplb-affinity-primary-tokens", "-1"],
        "further": [*FURTHER, "1", *REPLICAS, *NORMAL],
        "further without primary": [*AFFINITY, *REPLICAS, *NORMAL, "--eplb-affinity-further-slots", "1"],
        "further without all-to-all": [*FURTHER, "1", *REPLICAS],
        "further too many": [*FURTHER, "3", *REPLICAS, *NORMAL],
        "further negative": [*FURTHER, "-1", *REPLICAS, *NORMAL],
        "cover": [*EP2, "--ep-dispatch-algorithm", "cover"],
        "normal": [*AFFINITY, *REPLICAS, *NORMAL],
        "auto": [*AFFINITY, *REPLICAS, *NORMAL[:-1], "auto"],
        "auto nodes": [*AFFINITY, *REPLICAS, *NORMAL[:-1], "auto", "--eplb-affinity-nodes", "2"],
        "auto prefill": [*AFFINITY, *REPLICAS, *NORMAL[:-1], "auto", "--disaggregation-mode", "prefill"],
        "normal asked": [*AFFINITY, *REPLICAS, *NORMAL, "--ep-dispatch-algorithm", "static"],
        "normal without replicas": [*AFFINITY, *NORMAL],
        "normal vanilla": [*EP2, *REPLICAS, *NORMAL, "--enable-eplb", "--eplb-algorithm", "deepseek"],
        "low latency": [*AFFINITY, *REPLICAS, "--moe-a2a-backend", "deepep", "--deepep-mode", "low_latency"],
        "v2": [*AFFINITY, *REPLICAS, *V2],
        "v2 hybrid": [*AFFINITY, *REPLICAS, *V2, "--deepep-v2-mode", "hybrid", "--eplb-async"],
        "v2 primary": [*AFFINITY, *REPLICAS, *V2, "--ep-dispatch-algorithm", "primary"],
        "v2 two-batch": [*AFFINITY, *REPLICAS, *V2, "--enable-two-batch-overlap"],
        "v2 elastic": [*AFFINITY, *V2, "--ep-dispatch-algorithm", "cover", "--elastic-ep-backend", "mooncake"],
        "v2 mode": [*AFFINITY, *V2, "--expert-distribution-recorder-mode", "per_token"],
        "a2a": [*AFFINITY, "--moe-a2a-backend", "ascend_fuseep"],
        "cover a2a": [*EP2, "--ep-dispatch-algorithm", "cover", "--moe-a2a-backend", "ascend_fuseep"],
        "runner": [*AFFINITY, "--moe-runner-backend", "triton_kernel"],
        "phase": [*AFFINITY, "--eplb-affinity-phase", "decode"],
        "phase without a recorder": [*EP2, "--eplb-affinity-phase", "decode"],
        "phase of another role": [*AFFINITY, "--disaggregation-mode", "prefill", "--eplb-affinity-phase", "decode"],
        "megamoe": [*AFFINITY, "--moe-runner-backend", "flashinfer_megamoe"],
        "every": [*AFFINITY, "--expert-affinity-record-every", "0"],
        "every too large": [*AFFINITY, "--expert-affinity-record-every", "2000"],
        "last": [*AFFINITY, "--expert-affinity-record-last-passes", "1001"],
        "last without eplb": [*EP2, "--expert-affinity-record-last-passes", "5"],
    }
    names = ["missing.json", "range.json", "layers.json", "slots.json", "broken.json", "other.pt", "absent.json"]
    for name in [*names, "recorded.json", "ascend4.json"]:
        cases[name] = [*AFFINITY, "--init-expert-location", str(files / name)]
    lines = [["--model-path", str(models / "qwen3moe"), "--device", "cpu", *flags] for flags in cases.values()]
    # LongCat-Flash's name for experts without weights behind the others.
    zero = files / "zero"
    zero.mkdir()
    for file in (models / "qwen3moe").iterdir():
        (zero / file.name).symlink_to(file)
    (zero / "config.json").unlink()
    config = json.loads((models / "qwen3moe" / "config.json").read_text()) | {"zero_expert_num": 8}
    (zero / "config.json").write_text(json.dumps(config))
    cases["zero experts"] = []
    lines.append(["--model-path", str(zero), "--device", "cpu", *AFFINITY])
    cases["dense"] = []
    lines.append(["--model-path", str(models / "dense"), "--device", "cpu", *AFFINITY])
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.check_arguments"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        env={**os.environ, **cpu_environment(2)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(found) == len(cases), done.stderr[-2000:]
    return dict(zip(cases, found, strict=True))


def test_affinity_alone_turns_eplb_on(results: dict[str, dict]) -> None:
    assert results["affinity alone"] == {
        "code": 0,
        "errors": [],
        "resolved": {
            "enable_eplb": True,
            "eplb_algorithm": "affinity",
            "expert_distribution_recorder_mode": "stat",
            "ep_dispatch_algorithm": "dynamic",
            "eplb_affinity_primary_tokens": None,
        },
    }
    assert results["good map"]["code"] == results["ascend map"]["code"] == 0
    assert (results["elastic ranks go"]["code"], results["elastic ranks go"]["errors"]) == (0, [])
    for rule in ("cover", "cover_balanced", "primary"):
        assert results[rule] == {
            "code": 0,
            "errors": [],
            "resolved": {
                "enable_eplb": False,
                "eplb_algorithm": "auto",
                "expert_distribution_recorder_mode": None,
                "ep_dispatch_algorithm": rule,
                "eplb_affinity_primary_tokens": None,
            },
        }


def test_the_default_rule_of_each_mode(results: dict[str, dict]) -> None:
    cases = ["normal", "normal asked", "normal without replicas", "normal vanilla", "low latency", "auto"]
    cases += ["auto prefill", "auto nodes"]
    rules = {case: results[case]["resolved"].get("ep_dispatch_algorithm") for case in cases}
    others = {"normal": "cover_balanced", "auto prefill": "cover_balanced", "low latency": "primary", "auto": "primary"}
    others["auto nodes"] = "primary"  # without small passes
    assert rules == {case: others.get(case, "static") for case in cases}, results
    sizes = {case: results[case]["resolved"].get("eplb_affinity_primary_tokens") for case in cases}
    assert sizes == {case: 0 if case == "auto nodes" else None for case in cases}, results


@pytest.mark.skipif(not HAS_V2, reason="SGLang 0.5.17 has no DeepEP V2")
def test_deepep_v2_is_served_direct_and_hybrid_and_what_cannot_be_is_refused_in_one_line(
    results: dict[str, dict],
) -> None:
    rules = {case: results[case]["resolved"].get("ep_dispatch_algorithm") for case in ("v2", "v2 hybrid", "v2 primary")}
    assert rules == {"v2": "static", "v2 hybrid": "static", "v2 primary": "primary"}, results
    refused = {
        "v2 elastic": "--ep-dispatch-algorithm cover: works on cuda and cpu without --elastic-ep-backend",
        "v2 mode": "--expert-distribution-recorder-mode per_token: --eplb-algorithm affinity needs mode stat",
    }
    for case, message in refused.items():
        assert results[case]["code"] == 2 and message in results[case]["errors"][0]
    assert "DeepEP v2 MoE has not implemented the TBO/SBO overlap hooks" in results["v2 two-batch"]["code"]  # SGLang's


@pytest.mark.parametrize("case", ["async", "async deepseek", "gain", "survive", "tp and ep async", "lora attention"])
def test_rebalancing_flags_are_accepted(results: dict[str, dict], case: str) -> None:
    assert results[case]["code"] == 0, results[case]["errors"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown", "--eplb-algorithm affinty: unknown; known are auto, deepseek"),
        ("no ep", "needs expert parallelism, but the EP size is 1"),
        ("divide", "--ep-num-redundant-experts 3: with the model's 16 experts this makes 19 slots"),
        ("too many", "--ep-num-redundant-experts 18: 16 already put each of the model's 16 experts on each of 2 ranks"),
        ("nodes", "--eplb-affinity-nodes 3: must divide the EP size 2"),
        ("sample", "--expert-affinity-sample-tokens 0: must be at least 1"),
        ("increase", "--eplb-affinity-max-load-increase -0.5: must be 0 or more"),
        ("increase inf", "--eplb-affinity-max-load-increase inf: must be 0 or more, and finite"),
        ("p95", "--eplb-affinity-p95-allowance -0.1: must be 0 or more"),
        ("p95 inf", "--eplb-affinity-p95-allowance inf: must be 0 or more, and finite"),
        ("p95 off", "--eplb-affinity-p95-allowance 0.1: needs --eplb-algorithm affinity"),
        ("mode", "--expert-distribution-recorder-mode per_token: --eplb-algorithm affinity needs mode stat"),
        ("a2a", "--moe-a2a-backend ascend_fuseep: its top-k hands out no logical expert ids, so --eplb-algorithm aff"),
        ("a2a", "works with --moe-a2a-backend none, deepep, mooncake, nixl, mori, flashinfer, megamoe, pplx"),
        ("cover a2a", "so --ep-dispatch-algorithm cover finds none; works with"),
        ("runner", "--moe-runner-backend triton_kernel: chooses experts inside its kernel"),
        ("zero experts", "its router also chooses 8 zero experts, which no map has; leave out EPLB"),
        ("megamoe", "--moe-runner-backend flashinfer_megamoe: "),
        ("primary tokens", "--eplb-affinity-primary-tokens 64: needs --ep-dispatch-algorithm primary"),
        ("primary tokens negative", "--eplb-affinity-primary-tokens -1: must be 0 or more"),
        ("further without primary", "--eplb-affinity-further-slots 1: needs --ep-dispatch-algorithm primary"),
        ("further without all-to-all", "--eplb-affinity-further-slots 1: needs an all-to-all backend such as"),
        (
            "further too many",
            "--eplb-affinity-further-slots 3: must be at most 2, the slots of a GPU besides one of ea",
        ),
        ("further negative", "--eplb-affinity-further-slots -1: must be 0 or more"),
        ("every", "--expert-affinity-record-every 0: must be at least 1"),
        ("phase without a recorder", "--eplb-affinity-phase decode: nothing is recorded; leave it out or give"),
        ("phase of another role", "with --disaggregation-mode prefill the server runs prefill passes only"),
        (
            "every too large",
            "--expert-affinity-record-every 2000: records nothing of the 1000 passes before a rebalance",
        ),
        ("last", "--expert-affinity-record-last-passes 1001: must be 1 to 1000 (--eplb-rebalance-num-iterations)"),
        ("last without eplb", "--expert-affinity-record-last-passes 5: counts back from a rebalance, but EPLB is off"),
        ("dense", "has no routed experts"),
        ("async warm-up", "--eplb-async-warm-up-passes -1: must be 0 or more"),
        ("survive alone", "no expert is on two ranks without redundant experts; give --ep-num-redundant-experts"),
        ("survive a node", "--eplb-affinity-survive node: needs two nodes or more, but --nnodes"),
        ("survive moves", "--eplb-affinity-survive rank: plans that keep to the map in force"),
        ("survive off", "--eplb-affinity-survive rank: needs --eplb-algorithm affinity"),
        ("async gain", "--eplb-min-gain 1.5: must be a fraction, 0 to below 1"),
        ("gain range", "--eplb-min-gain -0.1: must be a fraction, 0 to below 1"),
        ("gain off", "--eplb-min-gain 0.1: needs --eplb-async or --eplb-algorithm affinity"),
        ("async off", "--eplb-async-layers-in-flight 4: needs --eplb-async"),
        ("async without eplb", "--eplb-async: needs --enable-eplb"),
        ("async algorithm", "not with --eplb-algorithm elasticity_aware"),
        ("async chunks", "--eplb-rebalance-layers-per-chunk 2: does not go with --eplb-async; use --eplb-async-layers"),
        ("async threshold", "--eplb-min-rebalancing-utilization-threshold 0.9: does not go with --eplb-async; use"),
        ("tp and ep", "--ep-size 2: SGLang's synchronous rebalance takes the tensor-parallel rank for the"),
        ("pp", "--pp-size 2: pipeline stages do not rebalance together with --eplb-algorithm affinity; use 1"),
        ("pp async", "--pp-size 2: pipeline stages do not rebalance together with --eplb-async; use 1"),
        ("lora", "--enable-lora: adapters of experts are kept by contiguous expert ids, so with EPLB they would"),
        ("lora map", "so with --init-expert-location they would act on other experts"),
        ("weight cache", "--weight-cache-mode client: --eplb-algorithm affinity would move experts in the daemon's"),
        ("memory saver", "--enable-memory-saver: /release_memory_occupation takes weights away that --eplb-async"),
        ("pdmux", "--enable-pdmux: prefill and decode run at the same time there, so --eplb-async could change"),
        ("elastic", "--elastic-ep-backend mooncake: does not go with --eplb-async; leave the flag out"),
        ("elastic ranks come", "--max-ep-size 4: --eplb-algorithm affinity plans for the 2 ranks that the server"),
        ("elastic chunks", "--eplb-rebalance-layers-per-chunk 2: a rank that is lost between two chunks would come"),
        ("missing.json", "layer 2 has no replica of logical expert 5"),
        ("range.json", "layer 1 slot 3 holds expert 16, but ids must be 0 to 15"),
        ("layers.json", "has 3 layers of 16 slots, but the model needs 4 layers of 16"),
        ("slots.json", "has 4 layers of 18 slots, but the model needs 4 layers of 16"),
        ("broken.json", "broken.json: not JSON"),
        (
            "other.pt",
            "has 24 layers of 32 experts, but the model needs 4 layers of 16 experts; is it another model's dump?",
        ),
        ("absent.json", "absent.json: cannot be read"),
        ("recorded.json", "recorded for EP size 4, but the server has 2; nodes 2, but the server has 1"),
        ("ascend4.json", "is for EP size 4, but the server has 2"),
        ("ep 1", "--init-expert-location: needs expert parallelism, but the EP size is 1"),
        ("record suffix", "must end in .json"),
        ("record folder", "does not exist"),
        ("record nothing", "there are no rebalances to record without --enable-eplb"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(results: dict[str, dict], case: str, message: str) -> None:
    result = results[case]
    assert result["code"] == 2
    assert len(result["errors"]) == 1 and message in result["errors"][0]
