"""The stall comparison's order and figures; the run itself needs servers (tests/server) or GPUs."""

import json

import numpy as np

from bench.gpu.rebalance_stall import CPU_SETTING, INTERVAL, StallLoad, gpu_flags, gpu_setting, order_of
from bench.gpu.stall_report import entries, ratios, rounds, settled, verification
from bench.publish.summary import parse_figures


def test_every_arm_has_every_load_in_every_block_and_modes_stay_together() -> None:
    setting = gpu_setting(2, ["normal", "auto"])
    order = order_of(setting, range(3))
    assert len(order) == (3 + 1) * 2 * 6 + 2  # and the verified arm, which only warms up
    for block in range(3):
        cells = [(load.name, arm) for b, load, arm in order if b == block]
        assert sorted(cells) == sorted((load, arm.name) for load in ("c128", "c512") for arm in setting.arms())
    first = [next(arm for b, _, arm in order if b == block) for block in range(3)]
    assert len(set(first)) > 1, "arms change places from block to block"


def test_arms_differ_in_their_flags_only_by_what_is_compared() -> None:
    flags = {arm.name: set(arm.flags) for arm in CPU_SETTING.arms()}
    assert not any("eplb" in flag for flag in flags["cpu-none"])
    for mode in ("normal", "low_latency"):
        arms = {arm.name: arm.flags for arm in gpu_setting(2, [mode]).arms()}
        common = arms[f"{mode}-none"]
        assert "--ep-num-redundant-experts" in common and all(arm[: len(common)] == common for arm in arms.values())
    ours = {"affinity", "--eplb-async", "--eplb-min-gain", "0", "--eplb-async-phase-limit", "3600"}
    assert flags["cpu-async"] - flags["cpu-sync"] == ours


def test_streams_run_beside_longer_requests_and_all_fit_the_pool() -> None:
    measured, background = (load := StallLoad(128, 32, 256, 400)).measured(), load.background()
    assert measured.streams and not background.streams
    assert (measured.requests, background.requests) == (measured.concurrency, background.concurrency) == (32, 96)
    flags = gpu_flags(2)
    pool = int(flags[flags.index("--max-total-tokens") + 1])
    for loads in gpu_setting(2, ["normal", "low_latency"]).loads.values():
        for load in loads:
            assert load.output_tokens < load.background_tokens
            assert load.concurrency / 2 * (load.input_tokens + load.background_tokens) < pool
            assert load.output_tokens >= 2 * INTERVAL  # at least one rebalance falls into it


def cell(arm: str, block: int, p99: float, most: float, throughput: float) -> dict:
    itl = {"p50": 1.0, "p99": p99, "max": most}
    return {"arm": arm, "load": "c4", "block": block, "itl_ms": itl, "decode_throughput": throughput}


def test_latencies_of_a_streams_first_half_second_do_not_count() -> None:
    assert settled(np.full(200, 10.0)).size == 150
    assert settled(np.array([400.0, 90.0, 20.0, 30.0, 2000.0])).tolist() == [20.0, 30.0, 2000.0]
    assert settled(np.full(8, 10.0)).size == 6


def test_ratios_are_paired_by_block_and_leave_the_warm_up_out() -> None:
    cells = [cell("m-none", -1, 99, 99, 1), cell("m-async", -1, 1, 1, 1)]
    for block, slow in enumerate((1.0, 2.0)):
        cells += [cell("m-none", block, 10 * slow, 20 * slow, 100 / slow)]
        cells += [cell("m-async", block, 11 * slow, 30 * slow, 99 / slow)]
    found = ratios(cells)["m-async c4"]
    assert (
        found["p99_itl"]["ratio"] == 1.1 and found["max_itl"]["ratio"] == 1.5 and found["throughput"]["ratio"] == 0.99
    )
    assert found["p99_itl"]["blocks"] == 2 and list(ratios(cells)) == ["m-async c4"]


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


def test_what_was_verified_is_counted() -> None:
    log = "[eplb-affinity] verify: all 4 layers hold what the map says\n" * 2
    log += "[eplb-affinity] verify: rank 1 has wrong weights for (layer, expert) [(0, 3)]\n"
    assert verification(log) == {"right": 2, "wrong": 1}


def test_entries_are_the_worst_of_modes_and_loads() -> None:
    cells = []
    for block in range(2):
        for mode, slow in (("normal", 1.1), ("auto", 1.3)):
            cells += [cell(f"{mode}-none", block, 10, 20, 100), cell(f"{mode}-sync", block, 50, 90, 90)]
            cells += [cell(f"{mode}-async", block, 10 * slow, 20 * slow, 100 / slow)]
    source = {"hardware": "x", "versions": {"sglang": "0.5.17"}, "commit": "abc1234"}
    of_rounds = {"auto-async": {"layers_committed": 2, "commit_ms_per_layer": {"p50": 1.0, "p99": 2.0, "max": 3.0}}}
    result = {"provenance": source, "date": "2026-01-01T00:00:00Z", "command": "x", "rounds": of_rounds}
    result["flags"] = ["--tp", "2"]
    found = entries({**result, "ratios_to_no_rebalancing": ratios(cells)})
    values = {figure.name: figure.value for figure in parse_figures(found, "entries")}
    assert values == {
        "async.p99_itl_ratio": 1.3, "async.max_itl_ratio": 1.3, "async.throughput_loss_pct": 23.08,
        "sync.p99_itl_ratio": 5.0, "async.commit_ms_per_layer.p99": 2.0,
    }  # fmt: skip
    result["flags"] = ["--tp", "4"]
    assert entries({**result, "ratios_to_no_rebalancing": ratios(cells)})[0]["name"] == "ep4.async.p99_itl_ratio"
    assert found[0]["unit"] == "ratio to no rebalancing, auto-async c4"
    assert entries({**result, "rounds": {}, "ratios_to_no_rebalancing": ratios(cells[:6])}) == []
