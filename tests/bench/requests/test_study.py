"""The study: its traces, its joint search, its steps, its rule, and its command."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from bench.requests.__main__ import main
from bench.requests.dealing import InFlight
from bench.requests.joint import Search, anneal, spread_map
from bench.requests.labels import CopyCost
from bench.requests.report import entries, write_tables
from bench.requests.steps import measure_steps, tokens_of_step
from bench.requests.study import Case, cases_for, decision, system_for, verdict, verdicts
from bench.requests.workload import Requests, StudyTraces
from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.simulate.system import load_system
from sglang_eplb_affinity.simulate.timing import TimeModel

EXPERTS, LAYERS, K = 16, 2, 4


def trace_of(kinds: np.ndarray, length: int = 40, seed: int = 0) -> RoutingTrace:
    """Requests whose tokens mostly take the 8 experts of their kind (0 or 1)."""
    rng = np.random.default_rng(seed)
    rows = []
    for kind in np.repeat(kinds, length):
        weight = np.where(np.arange(EXPERTS) // 8 == kind, 1.0, 0.05)
        rows.append([rng.choice(EXPERTS, K, replace=False, p=weight / weight.sum()) for _ in range(LAYERS)])
    return RoutingTrace(
        np.array(rows, np.int16), EXPERTS, np.repeat(np.arange(len(kinds)), length).astype(np.int32), source="made"
    )


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return trace_of(np.arange(12) // 2 % 2)


@pytest.fixture(scope="module")
def trace_file(trace: RoutingTrace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "made_dev.npz"
    trace.save(path)
    return path


def test_plan_and_test_share_no_sequence_and_prompts_are_a_quarter(trace_file: Path) -> None:
    traces = StudyTraces.load(str(trace_file))
    assert traces.name == "made" and not traces.pseudo
    assert (len(traces.plan), len(traces.test)) == (6, 6)
    assert traces.test.cuts.tolist() == [10] * 6
    assert traces.test.trace.sequence is not None
    assert set(traces.test.trace.sequence.tolist()) == {1, 3, 5, 7, 9, 11}
    assert traces.test.prompt_signature().sum((1, 2)) == pytest.approx(np.full(6, LAYERS * K))


def test_without_sequences_runs_of_128_tokens_stand_for_requests(trace: RoutingTrace, tmp_path: Path) -> None:
    RoutingTrace(trace.topk_ids, EXPERTS).save(tmp_path / "x.npz")
    traces = StudyTraces.load(str(tmp_path / "x.npz"))
    assert traces.pseudo
    assert [len(rows) for rows in traces.plan.rows] == [128, 128]
    assert (traces.plan.trace.topk_ids[128:] == trace.topk_ids[256:384]).all()


def test_too_few_sequences_are_refused(trace: RoutingTrace) -> None:
    with pytest.raises(InputError, match="1 sequences"):
        Requests.of(trace.select(np.arange(40)))


def test_cases_divide_and_differ() -> None:
    cases = cases_for(64)
    assert len({case.label for case in cases}) == len(cases) == 14
    assert all((64 + case.redundant) % case.gpus == 0 for case in cases)
    assert len(cases_for(32)) == 13  # on 32 GPUs the next number that divides is 32 for both


def test_spread_map_never_puts_an_expert_on_a_gpu_twice() -> None:
    counts = np.random.default_rng(0).integers(0, 100, (3, 16))
    made = spread_map(counts, Topology(4, 2), 40)
    for row in made.physical_to_logical:
        assert all(len(set(gpu.tolist())) == 10 for gpu in row.reshape(4, 10))


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_search_that_knows_ranks_places_for_them(trace: RoutingTrace, mode: str) -> None:
    """Kind 0 on rank 0, kind 1 on rank 1: the map found for that sends fewer copies, at a capped load."""
    topology, cost = Topology(2, 1), CopyCost(1.0, 0.0)
    start = spread_map(np.ones((LAYERS, EXPERTS), np.int64), topology, EXPERTS)
    assert trace.sequence is not None
    source = trace.sequence // 2 % 2
    search = Search(tokens=300, proposals=1500, cap=1.1, threads=1)
    found = anneal(start, trace, source, topology, mode, cost, search)  # type: ignore[arg-type]
    tokens = trace.topk_ids.transpose(1, 0, 2)
    before, after = (measure(tokens, m, topology, "cover", source.astype(np.int32)) for m in (start, found))
    assert after.remote_gpu_copies.mean() < 0.75 * before.remote_gpu_copies.mean()
    assert after.load_max_over_mean.max() < 1.15
    again = anneal(start, trace, source, topology, mode, cost, search)  # type: ignore[arg-type]
    assert (again.physical_to_logical == found.physical_to_logical).all()


def test_steps_take_answers_tokens_in_decode_and_prompts_in_prefill(trace: RoutingTrace) -> None:
    requests = Requests.of(trace)
    step = InFlight(np.array([0, 3]), np.array([0, 7]), np.array([1, 0]))
    rows, ranks = tokens_of_step(requests, step, "decode")
    assert rows.tolist() == [10, 3 * 40 + 17] and ranks.tolist() == [1, 0]
    rows, ranks = tokens_of_step(requests, step, "prefill")
    assert rows.tolist() == [*range(8), *range(121, 129)] and ranks.tolist() == [1] * 8 + [0] * 8


def test_the_levelled_step_is_never_longer_and_own_rank_saves_copies(trace: RoutingTrace) -> None:
    requests = Requests.of(trace)
    system = system_for(load_system("gpt-oss-120b-h200"), Case(2, 1, 0), EXPERTS, K)
    topology = Topology(2, 1)
    expert_map = spread_map(np.ones((LAYERS, EXPERTS), np.int64), topology, EXPERTS)
    kinds = np.arange(12) // 2 % 2
    near = InFlight(np.arange(12), np.arange(12), kinds)
    far = InFlight(np.arange(12), np.arange(12), 1 - kinds)
    one, other = (
        measure_steps(requests, [step], expert_map, TimeModel(system), "decode", "low_latency", "static", 128)
        for step in (near, far)
    )
    assert one.remote_gpu_copies + other.remote_gpu_copies == pytest.approx(K)  # what is own here is remote there
    assert one.level_step_ms <= one.step_ms
    assert one.remote_node_copies == 0


def row(dealer: str, step: float, load: float = 1.0, queue: float = 1.0, trace: str = "a") -> dict[str, object]:
    return {
        "trace": trace, "case": "2x1+0", "phase": "decode", "map": "planned", "dealer": dealer, "step_ms": step,
        "load_max_over_mean": load, "queue_max_over_mean": queue,
    }  # fmt: skip


def test_verdict_needs_load_and_queue_within_two_per_cent() -> None:
    rows = [
        row("round robin", 101), row("shortest queue", 100), row("nearest, band 2%", 97),
        row("nearest, band 10%", 90, load=1.03), row("nearest, band 10%", 91, queue=1.03),
    ]  # fmt: skip
    found = verdict(rows)
    assert found.base["step_ms"] == 100
    assert found.gain_pct == pytest.approx(3)
    assert found.any["step_ms"] == 90


def test_decision_needs_two_traces() -> None:
    good = [row("shortest queue", 100), row("nearest, band 2%", 94)]
    other = [row("shortest queue", 100, trace="b"), row("nearest, band 2%", 94, trace="b")]
    assert not decision(verdicts(good))
    assert decision(verdicts(good + other))


def test_command_writes_rows_and_the_report_its_tables(trace_file: Path, tmp_path: Path) -> None:
    arguments = ["run", "--trace", str(trace_file), "--topology", "gpt-oss-120b-h200", "--case", "2x1+8"]
    done = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    frame = pd.read_csv(tmp_path / "out" / "made.csv")
    assert set(frame.phase) == {"prefill", "decode"}
    assert frame[frame.dealer == "shortest queue"].queue_max_over_mean.max() < 1.01
    write_tables(tmp_path / "out")
    text = (tmp_path / "out" / "made.md").read_text()
    assert text.startswith("# made, simulated\n") and "| 2x1+8 | prefill |" in text
    assert [entry["name"] for entry in entries(tmp_path / "out")] == ["requests.decision"]


@pytest.mark.parametrize("label", ["8x2", "x", "8xa+1"])
def test_a_bad_case_is_refused(trace_file: Path, tmp_path: Path, label: str) -> None:
    arguments = ["run", "--trace", str(trace_file), "--topology", "gpt-oss-120b-h200", "--case", label]
    done = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path)])
    assert isinstance(done.exception, InputError) and label in str(done.exception)
