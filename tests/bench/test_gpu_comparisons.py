"""What the GPU comparisons do around their servers: order and validity."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from bench.gpu.resident import Load, ResidentArm, ResidentServers, by_block, incomplete
from bench.harness.server import Server, ServerEnded, ServerFailed
from bench.micro.deepep import cases
from bench.micro.deepep.summary import local_to_spread
from sglang_eplb_affinity.device.forced_routing import balanced_order, rows_of_order
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.topology import Topology

LOADS = (Load("prefill", 64, 8, 128, 1, streams=False), Load("decode", 16, 16, 8, 64))


def servers(folder: Path, *names: str) -> ResidentServers:
    for name in names:
        (folder / f"server-{name}.log").write_text(decode_lines(1.0))
    return ResidentServers([ResidentArm(name) for name in names], folder, ["--flag"], {}, folder, 31000)


def decode_lines(rate: float) -> str:
    line = "[2026-11-21 22:30:24 TP0] Decode batch, #running-req: 4, gen throughput (token/s): {}, #queue-req: 0\n"
    return line.format(0.5) + line.format(rate)


def test_each_arm_takes_each_place_equally_often(tmp_path: Path) -> None:
    order = servers(tmp_path, "a", "b", "c", "d")._order(list(LOADS), range(4), 0.5)
    warm_up, measured = order[:8], order[8:]
    assert {step[0] for step in warm_up} == {-1} and len(measured) == 4 * 2 * 4
    assert all(load.requests == max(load.concurrency, 32 if load.name == "prefill" else 8) for *_, load in warm_up)
    places = Counter((index % 4, arm) for index, (_, arm, _) in enumerate(measured))
    assert set(places.values()) == {2}
    assert [load.name for *_, load in measured[:8]] == ["prefill"] * 4 + ["decode"] * 4
    assert [load.name for *_, load in measured[8:16]] == ["decode"] * 4 + ["prefill"] * 4


def test_all_arms_of_a_block_get_the_same_requests(tmp_path: Path) -> None:
    first, second = (LOADS[0].arguments(tmp_path, port, 7, tmp_path / "o.jsonl") for port in (1, 2))
    assert [a for a, b in zip(first, second, strict=True) if a != b] == ["1"]
    assert "--disable-stream" in first and "--disable-stream" not in LOADS[1].arguments(tmp_path, 1, 7, tmp_path)


def test_a_comparison_without_any_server_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.gpu.resident as resident

    monkeypatch.setattr(resident.sys, "executable", "/bin/false")
    with pytest.raises(ServerFailed, match="one: server ended while starting"), servers(tmp_path, "one"):
        pass


def test_a_server_that_fails_beside_others_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: Counter[str] = Counter()

    def start(server: Server) -> Server:
        starts[server.log.stem] += 1
        if (server.log.stem == "server-b" and starts["server-b"] < 2) or server.log.stem == "server-c":
            raise ServerEnded("out of memory")
        if server.log.stem == "server-d":  # took all its time: it would take it again
            raise ServerFailed("not ready")
        return server

    monkeypatch.setattr(Server, "__enter__", start)
    with servers(tmp_path, "a", "b", "c", "d") as started:
        assert list(started.servers) == ["a", "b"] and started.failed == {"c": "out of memory", "d": "not ready"}
    assert starts == {"server-a": 1, "server-b": 2, "server-c": 2, "server-d": 1}


def test_nothing_goes_on_without_a_server_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(tmp_path / "log", None)
    group = servers(tmp_path, "a", "b")
    monkeypatch.setattr(Server, "ended", property(lambda server: server.log.stem == "server-b"))
    assert [row["arm"] for row in group.run(LOADS[:1], 3, timeout_s=60, warm_up=0, client=client)] == ["a"]  # type: ignore[arg-type]


class FakeClient:
    """The second load fails; the servers' logs get longer with each."""

    def __init__(self, log: Path, environment: object) -> None:
        self.begun, self.log = 0, log

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None: ...

    def wait_until_ready(self, seconds: float) -> None: ...

    def begin(self, arguments: list[str]) -> None:
        self.begun += 1
        for log in self.log.parent.glob("server-*.log"):
            log.write_text(log.read_text() + decode_lines(100.0 * self.begun))
        if self.begun != 2:
            Path(arguments[arguments.index("--output-file") + 1]).write_text(json.dumps({"completed": self.begun}))

    def wait(self, seconds: float) -> None:
        if self.begun == 2:
            raise RuntimeError("failed")


def test_a_load_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.gpu.resident as resident

    monkeypatch.setattr(resident, "ServingProcess", FakeClient)
    rows = servers(tmp_path, "a", "b").run(LOADS, 1, timeout_s=60, warm_up=0)
    assert [(row["arm"], row["load"], row["completed"], row["decode_throughput"]) for row in rows] == [
        ("a", "prefill", 1, 100.0),
        ("a", "decode", 3, 300.0),
        ("b", "decode", 4, 400.0),
    ]


def test_rows_by_block_and_void_rows() -> None:
    rows = [{"arm": "a", "load": "decode", "block": b, "completed": c, "x": v} for b, c, v in [(-1, 1, 9), (0, 16, 2)]]
    assert by_block(rows, "a", "decode", "x") == {0: 2.0}
    assert incomplete(rows, LOADS) == []
    assert incomplete([{**rows[1], "completed": 15}], LOADS) == ["a, decode, block 0: 15 of 16 completed"]


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_balanced_ids_are_the_routings_that_deepep_is_measured_with(gpus: int) -> None:
    for variant, routing in (("local", "spread"), ("spread", str(gpus))):
        rows = rows_of_order(balanced_order(variant, 0, 64, Topology(gpus)), 8).astype(int)
        case = cases.Case("normal", 4096, "bf16", 64, routing)
        ids = cases.topk_ids(case, 0, gpus, 64, 8)
        assert sum(cases.copies(rows, 0, gpus, 64)) == sum(cases.copies(ids, 0, gpus, 64)) == case.fanout


def test_dispatch_ratio_of_the_committed_measurement() -> None:
    path = Path(__file__).parents[2] / "results" / "deepep" / "h200-x2.json"
    result = json.loads(path.read_text())
    figure = local_to_spread(result)
    assert figure.lower <= figure.value <= figure.upper < 1
    assert figure.name == "forced.fanout.dispatch_ratio_local_to_spread"
    result["sections"]["normal"]["rows"] = []
    with pytest.raises(InputError, match="no row of routing 2 at hidden 4096"):
        local_to_spread(result)
