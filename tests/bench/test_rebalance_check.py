"""What the GPU checks make of answers, the models that they serve, and when they measure."""

import argparse
import json
import time
from itertools import pairwise

import numpy as np
import pytest

from bench.figures.rebalance_log import WRONG_WEIGHTS
from bench.gpu import kernel_times, rebalance_check
from bench.gpu.deepseek_shaped import DeepseekSizes, write_config
from bench.gpu.flags import need_gpus, seconds_left, timing_options, wait_for
from bench.gpu.random_moe import build, write_tokenizer
from bench.gpu.rebalance_check import CPU_SIZES, Answer, differences, passed, summarize, within_noise
from bench.gpu.reference import Reference
from bench.gpu.rounds import rounds, verification
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.rebalance import verify


def test_the_deepseek_shape_is_readable_by_transformers(tmp_path) -> None:
    write_config(tmp_path, DeepseekSizes(moe_layers=2))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 3 and config["quantization_config"]["weight_block_size"] == [128, 128]
    assert (tmp_path / "tokenizer.json").is_file()


def test_every_token_of_a_random_model_has_text_of_its_own(tmp_path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, 4096)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [tokenizer.decode([token], skip_special_tokens=True).strip() for token in range(4096)]
    assert all(texts) and len(set(texts)) == 4096
    assert tokenizer.decode([5, 9]) == "w5 w9" and tokenizer.encode("w5 w9") == [5, 9]


def test_differences_stop_where_decoded_tokens_part() -> None:
    a = Answer(np.array([[1.0, 2.0]]), [[7, 8, 9]], np.array([[0.5, 0.5, 0.1]]))
    b = Answer(np.array([[1.0, 2.5]]), [[7, 3, 9]], np.array([[0.25, 0.5, 0.1]]))
    found = differences(a, b)
    assert found["prefill"].tolist() == [0.0, 0.5] and found["decode"].tolist() == [0.25]
    assert summarize([found, found])["prefill"] == {"values": 4, "mean": 0.25, "p99": 0.5, "max": 0.5}


@pytest.mark.parametrize(
    ("after", "fault", "right"), [(0.01, 0.05, True), (0.014, 0.05, False), (0.01, 0.011, False)], ids=str
)
def test_errors_may_not_grow_and_a_fault_must_show(after, fault, right) -> None:
    def of(mean: float) -> dict[str, dict[str, float]]:
        return {"prefill": {"mean": mean}, "decode": {"mean": 0.01}}

    result = {"error_before_rebalances": of(0.01), "error_after_rebalances": of(after)}
    assert within_noise({**result, "error_with_two_experts_of_a_layer_exchanged": of(fault)}) is right


def test_the_reference_sees_two_experts_exchanged(tmp_path) -> None:
    build(tmp_path, CPU_SIZES, "cpu")
    reference = Reference(tmp_path, "cpu")
    sequences = np.random.default_rng(0).integers(10, 4096, (4, 40)).tolist()
    right = reference.logprobs(sequences)
    assert right.shape == (4, 39) and (right < 0).all()
    with reference.swapped(1, 0, 1):
        assert np.abs(reference.logprobs(sequences) - right).mean() > 1e-3
    assert (reference.logprobs(sequences[:2]) == right[:2]).all()
    assert np.allclose(Reference(tmp_path, "cpu").logprobs(sequences[2:]), right[2:])


def test_measuring_waits_for_its_file_and_ends_at_its_time(tmp_path, capsys) -> None:
    parser = argparse.ArgumentParser()
    timing_options(parser, "loads")
    given = parser.parse_args(["--seconds", "50", "--end-at", str(time.time() + 20), "--hold", str(tmp_path / "go")])
    assert 10 < seconds_left(given) <= 20
    assert seconds_left(parser.parse_args(["--seconds", "50"])) == 50
    wait_for(given.hold, 0.3)
    assert "go did not come within" in capsys.readouterr().out
    given.hold.touch()
    wait_for(given.hold, 0)
    wait_for(None, 0)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (rebalance_check.main, []),
        (kernel_times.main, []),
    ],
)
def test_too_few_gpus_are_one_line_and_exit_code_2(main, arguments, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and ("GPU" in error or "--gpus" in error)


def test_more_gpus_than_there_are_is_named(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    need_gpus("x", 2)
    for gpus in (0, 3):
        with pytest.raises(InputError, match=f"--gpus {gpus}, but this host has 2"):
            need_gpus("x", gpus)


def test_rounds_are_read_from_the_servers_log() -> None:
    record = {"result": "applied", "seconds": 0.5, "passes": 12, "moved_bytes": 2_000_000, "commit_ms": [0.25, 0.75]}
    log = "\n".join(
        [
            f"[2026-01-01 00:00:00 TP0 EP0] [eplb-affinity] rebalance {json.dumps(record)}",
            f"[2026-01-01 00:00:00 TP0 EP0] [eplb-affinity] rebalance {json.dumps({'result': 'unchanged'})}",
            "[2026-01-01 00:00:00 DP0 TP0 EP0] [EPLBManager] rebalance end time=0.125s",
            "[2026-01-01 00:00:00 DP1 TP1 EP1] [EPLBManager] rebalance end time=9.0s",
        ]
    )
    found = rounds(log)
    assert found["results"] == {"applied": 1, "unchanged": 1} and found["layers_committed"] == 2
    assert found["commit_ms_per_layer"]["max"] == 0.75 and found["moved_mb_per_round"]["p50"] == 2.0
    assert found["upstream_seconds_per_rebalance"]["max"] == 0.125 and found["upstream_rebalances"] == 1


def test_wrong_weights_fail_the_check() -> None:
    log = "[eplb-affinity] verify: all 4 layers hold what the map says\n" * 2
    log += f"[eplb-affinity] verify: rank 1 {verify.WRONG} for (layer, expert) [(0, 3)]\n"
    assert verify.WRONG == WRONG_WEIGHTS and verification(log) == {"right": 2, "wrong": 1}
    errors = {phase: {"mean": 0.01} for phase in ("prefill", "decode")}
    result = {"error_before_rebalances": errors, "error_after_rebalances": errors, "rebalances_that_moved_experts": 9}
    result["error_with_two_experts_of_a_layer_exchanged"] = {"prefill": {"mean": 0.05}}
    assert passed({**result, "weights": {"right": 2, "wrong": 0}}, 9)
    assert not passed({**result, "weights": verification(log)}, 9)


@pytest.mark.parametrize(
    ("mode", "chunk", "tokens"), [("auto", 4096, 128), ("low_latency", 2048, 1024), ("v2", 2048, 2048)]
)
def test_the_check_serves_in_the_mode_that_it_is_asked_for(mode: str, chunk: int, tokens: int) -> None:
    flags = rebalance_check.server_flags(2, mode=mode)
    value = dict(pairwise(flags))
    assert value["--moe-a2a-backend"] == ("deepep_v2" if mode == "v2" else "deepep")
    assert value.get("--deepep-mode") == (None if mode == "v2" else mode)
    assert int(value["--chunked-prefill-size"]) == chunk
    ((name, most),) = rebalance_check.deepep_environment(mode).items()
    assert int(most) == tokens and ("_V2_" in name) is (mode == "v2")
    # What a rank prefills, and the largest graph, fit its buffer; auto prefills in normal mode, without such a limit.
    assert mode == "auto" or chunk // 2 <= tokens
    assert int(value["--cuda-graph-max-bs-decode"]) <= tokens
