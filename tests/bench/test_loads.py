"""Loads of a profile beside its main one, maps that are planned before a run, and cores of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import _at_levels, _load_names
from bench.figures.headline import default_prefix
from bench.figures.load_headlines import figures_of_loads
from bench.figures.metrics import latency_metrics
from bench.figures.rebalance_log import LogSummary
from bench.figures.server_log import decode_steps
from bench.figures.steady import decode_window
from bench.figures.validity import void_reasons
from bench.harness import pinning
from bench.harness.arms import ARMS, NEVER, RECORDER
from bench.harness.client_process import _body
from bench.harness.engine import ROOT
from bench.harness.pinning import Cores, pin_process
from bench.harness.profile import DECODE, PREFILL, Profile
from bench.harness.request_log import RequestLog
from bench.harness.run_folder import RunFolder, RunPlan
from bench.harness.schedule import CellKey
from bench.harness.server import server_command
from bench.harness.static_maps import placement_on_replay, write_maps
from bench.harness.store import CellRecord
from bench.harness.workload import requests_of, write_random_ids
from bench.publish.table import render, tidy
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from tests.bench.conftest import make_record
from tests.bench.loads import EPOCH, output

AUTO = Profile.named("h200-x2-auto")


@pytest.fixture
def auto_plan() -> RunPlan:
    return RunPlan(AUTO, ("none", "vanilla"), AUTO.load.concurrency, 3, "random token ids", "", ("", *AUTO.loads))


def test_each_load_is_measured_at_its_levels_and_in_its_blocks(auto_plan: RunPlan) -> None:
    cells = auto_plan.cells()
    assert len(cells) == len(set(cells)) == len({cell.name for cell in cells})
    of_block = {b: {(c.load, c.concurrency) for c in cells if c.block == b} for b in range(3)}
    others = {("prefill", 384), *(("decode", c) for c in (16, 64, 256, 512))}
    assert of_block == {0: {("", 384), *others}, 1: {("", 384), *others}, 2: others}
    assert CellKey(0, "vanilla", 64, "decode").name == "b0-vanilla-decode-c64"


def test_a_further_load_is_measured_at_some_of_its_levels() -> None:
    narrowed = _at_levels("main,decode:512:16", AUTO)
    assert (
        narrowed.loads["decode"].requests == {16: 16, 512: 512} and narrowed.loads["prefill"] == AUTO.loads["prefill"]
    )
    assert _load_names("main,decode:512:16", narrowed) == ("", "decode")
    assert _at_levels("prefill,decode", AUTO) == AUTO == _at_levels(None, AUTO)
    for wrong, said in (
        ("main:16", "main in 'main:16' is no further load"),
        ("decode:x", "--loads: 'x' is not a list"),
    ):
        with pytest.raises(InputError, match=said):
            _at_levels(wrong, AUTO)


def test_a_run_with_loads_goes_on_where_it_stopped(auto_plan: RunPlan, tmp_path: Path) -> None:
    assert RunPlan.from_json(auto_plan.to_json()) == auto_plan
    folder = RunFolder(tmp_path)
    done = [cell for cell in auto_plan.cells() if (cell.block, cell.load) == (0, "decode")]
    for cell in done:
        folder.store.append(make_record(cell))
    (sitting,) = folder.left(auto_plan)
    assert set(sitting.cells) == set(auto_plan.cells()) - set(done)
    fewer = replace(auto_plan, loads=("decode",), blocks=1)
    assert fewer.fingerprint() == auto_plan.fingerprint() and folder.left(fewer) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ('kind = "poems"', r"\[loads.x\] kind is 'poems', but must be one of requests, prefill, decode"),
        ('kind = "decode"\noutput_tokens = 2', r"\[loads.x\] output_tokens must be at least 4"),
        ("requests = 3", r"\[loads.x\] requests must map requests in flight"),
    ],
)
def test_a_wrong_load_is_refused_with_its_name(wrong: str, said: str) -> None:
    main = "[load]\noutput_tokens = 8\n[load.requests]\n4 = 40\n"
    more = "" if "requests" in wrong else "[loads.x.requests]\n4 = 4\n"
    tokens = "" if "output_tokens" in wrong else "output_tokens = 8\n"
    text = f'title = "t"\n[server]\nmodel = "m"\nranks = 2\n{main}[loads.x]\n{tokens}{wrong}\n{more}'
    with pytest.raises(InputError, match=said):
        Profile.parse(text, name="p", source="p.toml")


def wave(itl: float = 0.02, late: float = 0.0) -> RequestLog:
    """Four requests of 30 tokens that start together; the last gets its first token ``late`` seconds later."""
    outputs = [output(0.0, 0.1 + late * (i == 3), [(itl * (1 + 1e-6 * j), 1) for j in range(29)]) for i in range(4)]
    return RequestLog.of_outputs(outputs, 0.0, EPOCH, [(0.01 * i, 0.001 * i, 0.0) for i in range(90)])


def test_decoding_is_measured_while_all_decode() -> None:
    log = wave(late=0.2)
    window = decode_window(log)
    assert window is not None
    assert (window.start, window.end) == pytest.approx((0.3, 0.1 + 29 * 0.02), abs=1e-3)
    found = latency_metrics(log, AUTO.loads["decode"], 4)
    assert found["p90_tpot_ms"] == pytest.approx(20.0, rel=0.01)
    assert found["mean_concurrency"] == pytest.approx(4.0)
    assert decode_window(wave(late=5.0)) is None


DECODING = """\
[2026-11-28 10:00:00.000 DP0 TP0 EP0] Decode batch, #running-req: 32, #token: 9, gen throughput (token/s): 100.0, #queue-req: 0
[2026-11-28 10:00:00.060 DP0 TP0 EP0] Decode batch, #running-req: 32, #token: 9, gen throughput (token/s): 6400.0, #queue-req: 0
[2026-11-28 10:00:00.120 DP0 TP0 EP0] Decode batch, #running-req: 31, #token: 9, gen throughput (token/s): 9000.0, #queue-req: 0
"""  # noqa: E501


def test_a_decode_step_is_that_of_lines_with_the_most_requests() -> None:
    assert decode_steps(DECODING) == {"decode_step_ms": 5.0, "decode_step_requests": 32.0}
    assert decode_steps("") == {}


@pytest.mark.parametrize(
    ("kind", "metrics", "said"),
    [
        (PREFILL, {}, "too few full prefill passes; send more"),
        (PREFILL, {"full_prefill_ms": 90.0}, None),
        (DECODE, {}, "no time in which all requests decoded; ask for more output tokens"),
        (DECODE, {"p90_tpot_ms": 6.0}, None),
        (DECODE, {"p90_tpot_ms": 6.0, "client_cores": 0.95}, "the load generator was the bottleneck"),
        (DECODE, {"p90_tpot_ms": 6.0, "server_in_flight": 2.0}, "the schedulers held 2.0 of 4 requests"),
    ],
)
def test_what_voids_a_row_depends_on_the_kind_of_load(kind: str, metrics: dict[str, float], said: str | None) -> None:
    reasons = void_reasons(
        ARMS["vanilla"],
        requested=4,
        wanted_tokens=16,
        concurrency=4,
        open_loop=False,
        metrics={"completed": 4, "output_tokens": 16, **metrics},
        server_life=LogSummary((), 0),
        cell=LogSummary((), 0),
        kind=kind,
        one_map=True,
    )
    assert [said in reason for reason in reasons] == [True] if said else reasons == ()


def test_an_arm_that_serves_one_map_must_not_rebalance(affinity_log: str) -> None:
    from bench.figures.rebalance_log import parse_log

    log = parse_log(affinity_log)
    metrics = {"completed": 4.0, "output_tokens": 16.0, "full_prefill_ms": 9.0}
    common = {"requested": 4, "wanted_tokens": 16, "concurrency": 4, "open_loop": False, "kind": PREFILL}
    for arm, one_map in (("vanilla", True), ("affinity-idle", False)):
        logs = {"server_life": log, "cell": log, "one_map": one_map}
        (reason,) = void_reasons(ARMS[arm], metrics=metrics, **common, **logs)  # type: ignore[arg-type]
        assert reason == "2 rebalances in the log of an arm that rebalances nothing"


def test_arms_serve_their_own_map_and_record_nothing_for_the_benchmark() -> None:
    command = server_command(AUTO.server, ARMS["cover-32"], "m", 0, Path("maps/cover-32.json"))
    assert RECORDER not in command and command[-4:] == [*NEVER, "--init-expert-location", "maps/cover-32.json"]
    assert command[len(command) - command[::-1].index("--ep-num-redundant-experts")] == "32"
    vanilla = server_command(AUTO.server, ARMS["vanilla"], "m", 0, Path("maps/vanilla.json"))
    assert "--enable-eplb" not in vanilla and vanilla[-2:] == ["--init-expert-location", "maps/vanilla.json"]
    none = server_command(AUTO.server, ARMS["none"], "m")
    assert RECORDER not in none and "--init-expert-location" not in none
    assert server_command(AUTO.server, ARMS["balanced-local"], "m")[-1] == "balanced:local"


def test_further_slots_are_planned_for_and_asked_for(tmp_path: Path) -> None:
    config = replace(AUTO.server, plan_trace="bench/data/tiny_moe_plan.npz", nodes=2)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"num_hidden_layers": 6}')
    maps = write_maps(config, ["primary-32", "primary-32-further"], str(model), tmp_path / "maps")
    without, further = (ExpertMap.load(path).physical_to_logical.reshape(6, 2, 48) for path in maps.values())
    assert (np.sort(without) == np.sort(further)).all() and (without != further).any()  # another order, no other GPU
    command = server_command(config, ARMS["primary-32-further"], "m", 0, maps["primary-32-further"])
    assert command[command.index("--eplb-affinity-further-slots") + 1] == "8"
    assert "--eplb-affinity-further-slots" not in server_command(config, ARMS["primary-32"], "m")


def test_by_phase_serves_a_map_for_decode_without_small_passes(tmp_path: Path) -> None:
    config = replace(AUTO.server, plan_trace="bench/data/tiny_moe_plan.npz", nodes=2)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"num_hidden_layers": 6}')
    maps = write_maps(config, ["by-phase", "affinity", "primary"], str(model), tmp_path / "maps")
    by_phase, static, primary = (path.read_text() for path in maps.values())
    assert by_phase == static != primary
    command = server_command(config, ARMS["by-phase"], "m", 0, maps["by-phase"])
    assert command[len(command) - command[::-1].index("--ep-dispatch-algorithm")] == "primary"
    assert command[command.index("--eplb-affinity-primary-tokens") + 1] == "0"


def test_maps_are_planned_once_and_layers_follow_the_replayed_ones(tmp_path: Path) -> None:
    config = replace(AUTO.server, plan_trace="bench/data/tiny_moe_test.npz")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"num_hidden_layers": 8}')
    maps = write_maps(config, ["none", "vanilla", "vanilla-again"], str(model), tmp_path / "maps")
    assert {name: path.name for name, path in maps.items()} == dict.fromkeys(
        ["vanilla", "vanilla-again"], "vanilla.json"
    )
    found = ExpertMap.load(maps["vanilla"]).physical_to_logical
    assert found.shape == (8, 72) and np.array_equal(found[6:], found[:2])
    before = maps["vanilla"].stat().st_mtime_ns
    write_maps(config, ["vanilla"], str(model), tmp_path / "maps")
    assert maps["vanilla"].stat().st_mtime_ns == before
    figures = placement_on_replay(config, ARMS["vanilla"], maps["vanilla"])
    plain = placement_on_replay(config, ARMS["none"], None)
    assert figures is not None and plain is not None and figures["balancedness"] > plain["balancedness"]
    assert placement_on_replay(replace(config, flags=()), ARMS["none"], None) is None


def test_cores_are_divided_without_overlap() -> None:
    cores = Cores.of(range(32), 2)
    assert cores is not None
    everyone = [*cores.schedulers, cores.rest, cores.client]
    assert sorted(core for own in everyone for core in own) == list(range(32))
    assert [len(own) for own in everyone] == [8, 8, 12, 4]
    assert Cores.of(range(8), 2) is None


def test_all_threads_of_a_process_are_pinned() -> None:
    code = "import threading, time; threading.Thread(target=time.sleep, args=(30,)).start(); print(1, flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        core = max(os.sched_getaffinity(0))
        pin_process(process.pid, (core,))
        threads = [int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir()]
        assert len(threads) == 2 and {frozenset(os.sched_getaffinity(t)) for t in threads} == {frozenset({core})}
        assert pinning.pin_server(process.pid, Cores(((core,),), (core,), (core,))) == 0  # no scheduler among them
        process.kill()


def test_tables_show_each_load_by_itself(auto_plan: RunPlan) -> None:
    records: list[CellRecord] = []
    for cell in auto_plan.cells():
        record = make_record(cell, scale=1.0 + 0.05 * (cell.arm == "vanilla") + 0.001 * cell.block)
        extra = {"full_prefill_ms": 90.0, "decode_step_ms": 6.0} if cell.load else {}
        records.append(replace(record, metrics={**record.metrics, **extra}))
    markdown = render(tidy(records), auto_plan, {"hardware": "h", "versions": {}})
    main, prefill, decode = (
        markdown.split("## Load")[0],
        *(markdown.split(f"## Load `{name}`")[1].split("## ")[0] for name in ("prefill", "decode")),
    )
    assert "| 384 | no EPLB |" in main and "| 64 |" not in main.split("## In the layout")[0]
    assert "| 384 | no EPLB | 90.00 |" in prefill and "vanilla EPLB" in prefill
    assert "| 64 | no EPLB | 6.00 |" in decode and "| 256 | no EPLB | vanilla EPLB |" in decode


def test_a_session_goes_on_between_calls(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / ".carry").mkdir(parents=True)
    (checkout / ".carry" / "commit").write_text("abcdef1")
    (checkout / "plan.sh").write_text(
        'echo "commit $SOURCE_COMMIT"; until [ -e "$CARRY/more" ]; do sleep 0.1; done; echo $1 >"$WORK/results/found"\n'
        'mkdir -p "$WORK/results/run/cells/b0"; echo log >"$WORK/results/run/cells/b0/requests.npz"\n'
    )
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    environment = {**os.environ, "WORK": str(tmp_path / "work"), "OUT": str(tmp_path / "out"), "HOME": str(home)}
    call = ["bash", str(ROOT / "bench" / "gpu" / "session.sh"), "2", "plan.sh", "argument"]

    def run() -> str:
        done = subprocess.run(call, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "going on" in run() and not (tmp_path / "work" / "results" / "found").exists()
    (checkout / ".carry" / "more").write_text("")
    call[2] = "20"
    assert "over\ncommit abcdef1" in run()
    parts = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert parts == ["caches.tar.xz.aa", "requests.tar.aa", "results.tar.gz.aa"]
    subprocess.run(["tar", "-xzf", tmp_path / "out" / "results.tar.gz.aa", "-C", tmp_path], check=True)
    assert (tmp_path / "results" / "found").read_text() == "argument\n"
    requests = tmp_path / "results" / "run" / "cells" / "b0" / "requests.npz"
    assert not requests.exists()
    subprocess.run(["tar", "-xf", tmp_path / "out" / "requests.tar.aa", "-C", tmp_path], check=True)
    assert requests.read_text() == "log\n"


def test_headline_figures_of_loads_are_ratios_to_each_baseline(auto_plan: RunPlan) -> None:
    arms = ("none", "vanilla", "vanilla-again", "affinity", "cover-32")
    plan = replace(auto_plan, arms=arms)
    step = {"none": 5.0, "vanilla": 5.5, "vanilla-again": 5.52, "affinity": 5.4, "cover-32": 6.0}
    records = []
    for cell in plan.cells():
        record, noise = make_record(cell), 1 + 0.001 * cell.block * (cell.arm == "affinity")
        own = step[cell.arm] * noise
        extra = {"full_prefill_ms": 20 * own, "decode_step_ms": own, "p90_tpot_ms": own, "p95_itl_ms": own}
        records.append(replace(record, metrics={**record.metrics, **extra}))
    found = dict(figures_of_loads(tidy(records), plan, "bench.auto.nvlink"))
    assert found["bench.auto.nvlink.prefill.cover-32.full_prefill_ratio_to_vanilla"]["value"] == pytest.approx(6 / 5.5)
    assert found["bench.auto.nvlink.decode64.none.decode_step_ratio_to_vanilla"]["value"] == pytest.approx(5 / 5.5)
    assert found["bench.replicas.nvlink.full_prefill_ratio_to_vanilla"]["value"] == pytest.approx(6 / 5.5)
    assert "bench.decode.p90_tpot_ratio_to_vanilla" not in found  # a decode server runs low-latency mode alone
    flags = tuple("low_latency" if flag == "auto" else flag for flag in plan.profile.server.flags)
    alone = replace(plan, profile=replace(plan.profile, server=replace(plan.profile.server, flags=flags)))
    assert default_prefix(alone) == "bench.low_latency.nvlink"
    decode = dict(figures_of_loads(tidy(records), alone, "x"))["bench.decode.p90_tpot_ratio_to_vanilla"]
    assert decode["lower"] < 5.4 / 5.5 * 1.001 < decode["upper"]
    assert found["bench.auto.nvlink.decode.noise_floor_pct"]["value"] == pytest.approx(100 * 0.02 / 5.5, rel=0.02)
    assert not any("vanilla-again" in name for name in found)


def test_itl_is_of_the_streams_that_come_token_by_token_alone(tmp_path: Path) -> None:
    load = replace(AUTO.loads["decode"], requests={4: 4}, token_streams=2)
    work = write_random_ids(tmp_path / "w.json", load, 100, [30] * 4, seed=1)
    assert [_body(r)["sampling_params"]["stream_interval"] for r in requests_of(work.path)] == [1, 1, 2**20, 2**20]
    every = write_random_ids(tmp_path / "e.json", replace(load, token_streams=0), 100, [30] * 4, seed=1)
    assert not any("stream_interval" in _body(r)["sampling_params"] for r in requests_of(every.path))
    # The other two bring 29 tokens at once with their last.
    slow = [(0.02 * (3 if i == 9 else 1) * (1 + 1e-6 * i), 1) for i in range(29)]
    whole = [(sum(gap for gap, _ in slow) + 0.01, 29)]
    outputs = [output(0.0, 0.1, gaps) for gaps in (slow, slow, whole, whole)]
    log = RequestLog.of_outputs(outputs, 0.0, EPOCH, [(0.01 * i, 0.001 * i, 0.0) for i in range(90)])
    found = latency_metrics(log, load, 4)
    assert found["p50_itl_ms"] == pytest.approx(20, rel=1e-3) and found["max_itl_ms"] == pytest.approx(60, rel=1e-3)
    assert found["mean_concurrency"] == pytest.approx(4) and "output_tokens_per_s" not in found
    assert "p50_itl_ms" not in latency_metrics(log, replace(load, token_streams=0), 4)  # half of them say nothing
