"""What the GPU checks do around their servers, and what DeepEP is measured with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from bench.gpu.resident import ResidentArm, ResidentServers
from bench.harness.server import Server, ServerEnded, ServerFailed
from bench.micro.deepep import cases
from bench.micro.deepep.summary import local_to_spread
from sglang_eplb_affinity.device.forced_routing import balanced_order, rows_of_order
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.topology import Topology


def servers(folder: Path, *names: str) -> ResidentServers:
    return ResidentServers([ResidentArm(name) for name in names], folder, ["--flag"], {}, folder, 31000)


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
