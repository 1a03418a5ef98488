"""The GPU overhead comparison: which flags its arms get, and what it makes of their values."""

import argparse
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from bench.gpu import kernel_times, overhead, overhead_report, rebalance_check, rebalance_stall
from bench.gpu.deepseek_shaped import DeepseekSizes, write_config
from bench.gpu.earlier import earlier
from bench.gpu.flags import decode_graphs, need_gpus, seconds_left, timing_options, wait_for
from bench.gpu.random_moe import build, write_tokenizer
from bench.gpu.rebalance_check import CPU_SIZES, Answer, differences, summarize, within_noise
from bench.gpu.reference import Reference
from bench.gpu.resident import Load
from sglang_eplb_affinity.domain.errors import InputError

SOURCE = {"hardware": "2 x GPU", "versions": {"torch": "2"}, "commit": "abcdef1"}
MEASURED = {"hardware": "2 x GPU", "date": "2026-01-01", "sittings": [{"commit": "abcdef1"}], "flags": ["--tp", "2"]}


def values(mode: str, **throughput: list[float]) -> dict[str, dict]:
    return {f"{arm}-{mode}": {"total_throughput": dict(enumerate(of_arm))} for arm, of_arm in throughput.items()}


def test_arms_of_a_group_differ_in_eplb_only_and_never_rebalance() -> None:
    arms = {arm.name: arm.flags for arm in overhead.GROUPS[0].arms}
    common = overhead.mode_flags("normal")
    assert set(arms) == {"none-normal", "upstream-normal", "ours-normal"} and arms["none-normal"] == common
    for name in ("upstream-normal", "ours-normal"):
        assert arms[name][-len(common) :] == common
        assert int(arms[name][arms[name].index("--eplb-rebalance-num-iterations") + 1]) >= 10**8


def test_the_modes_of_our_eplb_are_compared_beside_the_overhead() -> None:
    group = overhead.GROUPS[2]
    arms = {arm.name: arm.flags for arm in group.arms}
    assert len(arms) == 7
    (_, normal), (_, low_latency), (latency, of_ours) = group.loads(0).items()
    assert normal == ["none-normal", "upstream-normal", "ours-normal"]
    assert low_latency == ["none-low_latency", "upstream-low_latency", "ours-low_latency"] and latency.streams
    assert [arms[name][arms[name].index("--deepep-mode") + 1] for name in of_ours] == list(overhead.MODES)
    assert all("affinity" in arms[name] for name in of_ours)


def test_the_large_model_is_loaded_as_in_vllms_protocol_and_as_deep_as_fits() -> None:
    for group in overhead.GROUPS[:2]:
        ((load, _),) = group.loads(0).items()
        assert (load.input_tokens, load.output_tokens, load.streams) == (1000, 100, False)
        assert load.requests % load.concurrency == 0  # whole waves
        assert 0 < group.layers_on(79.2) < group.layers_on(139.8)


def test_the_pool_holds_every_request_of_a_rank() -> None:
    flags = overhead.server_flags(2, 500)
    values = {name: int(flags[flags.index(name) + 1]) for name in ("--max-total-tokens", "--max-running-requests")}
    assert values["--max-total-tokens"] >= 250 * 1100 and values["--max-running-requests"] >= 500
    at = flags.index("--cuda-graph-bs-decode") + 1
    assert flags[at : at + 6] == ["1", "8", "32", "64", "128", "258"]
    assert decode_graphs(60) == ["--cuda-graph-bs-decode", "1", "8", "32", "60"]


def test_losses_are_paired_by_block() -> None:
    found = overhead_report.losses(values("normal", none=[100, 200], upstream=[98, 196], ours=[99.5, 199]), "normal")
    assert found["upstream"] == {"value": 2.0, "lower": 2.0, "upper": 2.0, "blocks": 2}
    assert found["ours"]["value"] == 0.5


def test_passes_have_losses_of_their_own() -> None:
    of_passes = {"none": [100.0, 200.0], "upstream": [98.0, 196.0], "ours": [99.0, 198.0]}
    found = values("low_latency", none=[100, 90], upstream=[100, 90], ours=[90, 100])
    for arm, rates in of_passes.items():
        for metric in ("decode_throughput", "prefill_throughput"):
            found[f"{arm}-low_latency"][metric] = dict(enumerate(rates))
    given = {"group": "large.low_latency", "void": [], "values": {"low_latency": found}, **MEASURED}
    finished = overhead_report.finish(given)
    assert finished["prefill_loss_pct"]["low_latency"]["upstream"]["value"] == 2.0
    names = {entry["name"]: entry for entry in overhead_report.entries([finished], SOURCE)}
    ours = names["overhead.low_latency.decode_loss_pct"]
    assert ours["lower"] == ours["value"] == 1.0 and ours["unit"].endswith("in decode passes")
    assert names["overhead.low_latency.decode_loss_pct.upstream"]["value"] == 2.0
    assert names["overhead.low_latency.throughput_loss_pct"]["lower"] < -10


def test_entries_leave_out_void_groups_and_single_blocks() -> None:
    def result(group: str, mode: str, **throughput: list[float]) -> dict:
        found = {"group": group, "void": [], "values": {mode: values(mode, **throughput)}, **MEASURED}
        return overhead_report.finish(json.loads(json.dumps(found)))

    large = result("large.normal", "normal", none=[100, 101], upstream=[98, 99], ours=[100, 100])
    small = result("small", "low_latency", none=[100, 101], ours=[99, 100])
    void = {**result("large.low_latency", "low_latency", none=[1, 1], ours=[1, 1]), "void": ["ours rebalanced"]}
    once = result("large.low_latency", "low_latency", none=[100], ours=[99])
    entries = overhead_report.entries([large, {**small, "hardware": "2 x other GPU"}, void, once], SOURCE)
    assert overhead_report.entries([{**small, "flags": ["--tp", "4"]}], SOURCE)[0]["name"].startswith("ep4.overhead.")
    assert [entry["hardware"] for entry in entries] == ["2 x GPU", "2 x GPU", "2 x other GPU"]
    assert [entry["name"] for entry in entries] == [
        "overhead.normal.throughput_loss_pct.upstream",
        "overhead.normal.throughput_loss_pct",
        "overhead.low_latency.small.throughput_loss_pct",
    ]


def test_entries_of_modes_compare_auto_with_the_mode_it_should_beat() -> None:
    metrics = ("mean_ttft_ms", "mean_tpot_ms")
    of_arm = {"auto": 1.0, "normal": 2.0, "low_latency": 4.0}
    found = {f"ours-{mode}": {metric: {0: ms, 1: ms} for metric in metrics} for mode, ms in of_arm.items()}
    given = {"group": "large.low_latency", "void": [], "values": {"latency": found}, **MEASURED}
    entries = {
        entry["name"]: entry["value"] for entry in overhead_report.entries([overhead_report.finish(given)], SOURCE)
    }
    assert entries == {"auto.ttft_ratio_to_low_latency": 0.25, "auto.tpot_ratio_to_normal": 0.5}


def test_arms_that_ran_out_of_time_are_named() -> None:
    (load, arms), *_ = overhead.GROUPS[0].loads(0).items()
    rows = [{"arm": arm, "load": load.name, "block": block} for arm in arms for block in (-1, 0, 1)]
    assert overhead_report.unfinished(rows, {load: arms}, range(2)) == []
    found = overhead_report.unfinished(rows[:-1], {load: arms}, range(2))
    assert found == ["ours-normal, normal: 1 of 2 blocks not done in the time given"]


def test_an_unknown_group_is_one_line_and_exit_code_2(tmp_path, capsys) -> None:
    assert overhead.main(["--out", str(tmp_path), "--groups", "huge"]) == 2
    assert "--groups huge: unknown; known are large.normal" in capsys.readouterr().err


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


@pytest.mark.parametrize("mode", ["normal", "low_latency", "auto"])
def test_low_latency_alone_prefills_in_chunks_that_fit_its_buffer(mode) -> None:
    flags = overhead.mode_flags(mode)
    chunk = int(flags[flags.index("--chunked-prefill-size") + 1])
    assert (chunk <= 2 * overhead.LOW_LATENCY_TOKENS) == (mode == "low_latency")


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


def test_blocks_of_sittings_add_up() -> None:
    before = {"values": {"normal": {"none-normal": {"total_throughput": {"0": 100.0, "1": 101.0}}}}}
    metrics = (*overhead_report.LOSSES.values(), *overhead_report.LATENCIES)
    rows = [{"arm": "none-normal", "load": "normal", "block": 2, **dict.fromkeys(metrics, 7.0)}]
    load = Load("normal", 4, 2, 8, 8)
    found = overhead_report.values_of(rows, load, ["none-normal"], before)["none-normal"]
    assert found["total_throughput"] == {0: 100.0, 1: 101.0, 2: 7.0} and found["mean_ttft_ms"] == {2: 7.0}
    # Whole answers have no inter-token latency, and their first token comes with the last.
    found = overhead_report.values_of(rows, replace(load, streams=False), ["none-normal"], {})["none-normal"]
    assert found == {metric: {2: 7.0} for metric in overhead_report.LOSSES.values()}


def test_sittings_on_other_hardware_do_not(tmp_path) -> None:
    path = tmp_path / "overhead-small.json"
    assert earlier(path, {"hardware": "2 x A"}) == {}
    path.write_text(json.dumps({"hardware": "2 x A", "arms": {"none": ["--x"]}, "blocks": 3}))
    assert earlier(path, {"hardware": "2 x A", "arms": {"none": ("--x",)}})["blocks"] == 3
    with pytest.raises(InputError, match="another hardware than this sitting"):
        earlier(path, {"hardware": "2 x B"})
    path.write_text("cut sho")
    with pytest.raises(InputError, match="is not a result of this comparison"):
        earlier(path, {})


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (overhead.main, ["--groups", "small"]),
        (rebalance_check.main, []),
        (kernel_times.main, []),
        (rebalance_stall.main, ["--gpus", "1"]),
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


def test_a_ranks_share_of_decoding_fits_the_low_latency_buffer() -> None:
    for group in overhead.GROUPS:
        if "low_latency" in group.modes:
            flags = overhead.server_flags(2, group.concurrency)
            assert int(flags[flags.index("--max-running-requests") + 1]) // 2 <= overhead.LOW_LATENCY_TOKENS
