from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.harness import probe
from bench.harness.probe import ProbeFailed, load_window, placement_of, probe_placement
from bench.harness.profile import ServerConfig
from bench.harness.workload import Workload
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology

CONFIG = ServerConfig(model="m", ranks=4, nodes=2)


def window(*tokens: tuple[int, int]) -> RoutingWindow:
    ids = np.array(tokens, dtype=np.int16)[:, None, :]
    return RoutingWindow.from_trace(RoutingTrace(ids, num_experts=8))


def test_figures_by_hand() -> None:
    # Experts 0-1 on GPU 0, 2-3 on GPU 1 (node 0), 4-5 on GPU 2, 6-7 on GPU 3 (node 1).
    found = placement_of(window((0, 1), (0, 2), (0, 7)), Topology(4, 2))
    assert found["gpu_fanout"] == pytest.approx((1 + 2 + 2) / 3)
    assert found["node_fanout"] == pytest.approx((1 + 1 + 2) / 3)
    assert found["remote_gpu_copies"] == pytest.approx(0.75 * 5 / 3)
    assert found["remote_node_copies"] == pytest.approx(0.5 * 4 / 3)
    assert found["balancedness"] == pytest.approx((6 / 4) / 4)  # GPU 0 has 4 of 6 assignments


def test_layers_without_experts_do_not_count() -> None:
    one = window((0, 1), (0, 2), (0, 7))
    padded = RoutingWindow(
        np.concatenate([np.zeros_like(one.counts), one.counts]),
        None,
        np.concatenate([np.full_like(one.tokens, -1), one.tokens]),  # type: ignore[arg-type]
    )
    assert placement_of(padded, Topology(4, 2)) == placement_of(one, Topology(4, 2))


def test_an_empty_window_is_refused() -> None:
    empty = RoutingWindow(np.zeros((1, 8), dtype=np.int64), None, np.full((1, 4, 2), -1, dtype=np.int16))
    with pytest.raises(InputError, match="no tokens"):
        placement_of(empty, Topology(4, 2))


class FakeServer:
    """Writes ``dumps`` files when asked to dump; refuses everything when it has None."""

    def __init__(self, folder: Path, dumps: int | None) -> None:
        self.folder, self.dumps, self.asked = folder, dumps, list[str]()

    def post(self, path: str) -> None:
        if self.dumps is None:
            raise OSError("refused")
        self.asked.append(path)
        if path.startswith("/dump"):
            for number in range(self.dumps):
                (self.folder / f"{number}.pt").touch()


def run_probe(folder: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    (folder / "routing").mkdir()
    monkeypatch.setattr(probe, "send_all", lambda *_, **__: server.asked.append("requests"))
    monkeypatch.setattr(probe, "read_dump", lambda path: window((0, 1), (0, 2), (0, 7)))
    return probe_placement(server, Workload(folder / "w", 2, 16, ""), CONFIG, folder, folder / "routing" / "w.npz")


def test_recording_covers_the_requests_and_the_dump_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer(tmp_path, dumps=1)
    assert run_probe(tmp_path, server, monkeypatch)["node_fanout"] == pytest.approx(4 / 3)
    assert [path.split("_")[0] for path in server.asked] == ["/start", "requests", "/stop", "/dump"]
    assert not list(tmp_path.glob("*.pt"))
    kept = load_window(tmp_path / "routing" / "w.npz")
    assert kept.tokens is not None and sorted(kept.tokens[0].tolist()) == [[0, 1], [0, 2], [0, 7]]
    assert kept.counts[0, 0] == 3


@pytest.mark.parametrize(("dumps", "said"), [(None, "refused"), (0, "found 0"), (2, "found 2")])
def test_a_server_that_gives_no_dump_fails_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dumps: int | None, said: str
) -> None:
    with pytest.raises(ProbeFailed, match=said):
        run_probe(tmp_path, FakeServer(tmp_path, dumps), monkeypatch)
