"""Bytes and copies of the emulated link, what it does to a dispatcher, and (on a GPU) its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from bench.engines.emulated_link import hooks  # noqa: E402
from bench.engines.emulated_link.copies import combine_bytes, dispatch_bytes, remote_copies  # noqa: E402
from bench.engines.emulated_link.settings import BANDWIDTH, NODES, LinkSettings, to_environment  # noqa: E402
from bench.harness.engine import check_sglang, cpu_environment  # noqa: E402
from bench.harness.links import link_environment  # noqa: E402
from bench.harness.profile import ServerConfig  # noqa: E402
from sglang_eplb_affinity.domain.errors import InputError  # noqa: E402


def by_hand(ids: list[list[int]], slots_per_node: int, own: int, per_expert: bool) -> int:
    nodes = [[slot // slots_per_node for slot in row if slot >= 0] for row in ids]
    away = [[node for node in row if node != own] for row in nodes]
    return sum(len(row) if per_expert else len(set(row)) for row in away)


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("own", [0, 1, 3])
def test_copies_are_those_counted_by_hand(per_expert: bool, own: int) -> None:
    ids = torch.randint(-1, 72, (50, 8), generator=torch.Generator().manual_seed(own))
    ids[7] = -1  # padding
    assert remote_copies(ids, 18, own, per_expert).tolist() == [by_hand(ids.tolist(), 18, own, per_expert)]


def test_no_tokens_and_one_node_are_no_copies() -> None:
    assert remote_copies(torch.empty((0, 8), dtype=torch.int64), 18, 1, False).tolist() == [0]
    assert remote_copies(torch.zeros((5, 8), dtype=torch.int64), 18, 0, True).tolist() == [0]


def test_bytes_of_a_copy() -> None:
    assert dispatch_bytes(4096, 8, fp8=False, per_expert=False) == 8192 + 96
    assert dispatch_bytes(7168, 8, fp8=True, per_expert=True) == 7168 + 56 * 4 + 16  # DeepEP's own low-latency message
    assert combine_bytes(4096, 8, per_expert=False) == 8192 + 32
    assert combine_bytes(7168, 8, per_expert=True) == 14336


def test_settings_travel_by_environment() -> None:
    settings = LinkSettings.of(to_environment(25, 4))
    assert settings == LinkSettings(25.0, 4) and settings.gpus_per_node(8) == 2
    with pytest.raises(InputError, match="6 expert-parallel ranks do not divide over 4 nodes"):
        settings.gpus_per_node(6)
    for wrong in ({}, {BANDWIDTH: "fast", NODES: "2"}, {BANDWIDTH: "0", NODES: "2"}, {BANDWIDTH: "50", NODES: "1"}):
        with pytest.raises(InputError, match="emulated link"):
            LinkSettings.of(wrong)


class Group:
    def size(self) -> int:
        return 4

    def rank(self) -> int:
        return 2


def test_dispatch_and_combine_wait_for_their_own_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []
    monkeypatch.setattr(hooks.EmulatedLink, "after_dispatch", lambda link, ids: waits.append(("dispatch", link, ids)))
    monkeypatch.setattr(hooks.EmulatedLink, "after_combine", lambda link: waits.append(("combine", link)))
    monkeypatch.setattr(hooks.torch, "zeros", lambda *_, **__: "counter")
    impl = SimpleNamespace(
        group=Group(), num_local_experts=18, hidden_size=4096, router_topk=8, use_fp8=False
    )  # fmt: skip
    around = hooks.dispatch_hook(LinkSettings(25.0, 2), per_expert=False)
    assert around(lambda impl, *rest: rest, impl, "hidden", "ids", "weights", None) == (
        "hidden",
        "ids",
        "weights",
        None,
    )
    assert hooks.combine_hook(lambda impl, *rest: rest, impl, "output", None) == ("output", None)
    (_, link, ids), (_, again) = waits
    assert link is again and ids == "ids"
    assert (link.slots_per_node, link.own_node) == (36, 1)
    assert link.dispatch_picoseconds == (8192 + 96) * 40  # 25 GB/s: 40 ps a byte
    assert link.combine_picoseconds == (8192 + 32) * 40


HOOKED = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.moe.token_dispatcher import deepep
from sglang.srt.plugins.hook_registry import HookRegistry
for cls in (deepep._DeepEPDispatcherImplNormal, deepep._DeepEPDispatcherImplLowLatency):
    print(cls.__name__, *sorted(t.rsplit(".", 1)[1] for t in HookRegistry._patched if cls.__name__ in t))
    dispatch = cls.dispatch_b.__code__.co_filename
    assert dispatch.endswith("hook_registry.py"), dispatch
"""


@pytest.mark.server
def test_sglang_finds_the_plugin_and_it_hooks_both_modes_of_deepeps_dispatcher() -> None:
    try:
        check_sglang()
    except InputError as error:
        pytest.skip(str(error))
    environment = {**os.environ, **cpu_environment(2)}
    environment |= link_environment("emulated50", ServerConfig(model="m", ranks=2, nodes=2), environment)
    done = subprocess.run([sys.executable, "-c", HOOKED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == [
        "_DeepEPDispatcherImplNormal combine_b dispatch_b",
        "_DeepEPDispatcherImplLowLatency combine_b dispatch_b",
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("per_expert", [False, True])
def test_kernels_count_and_wait_in_a_graph_too(per_expert: bool) -> None:
    from bench.engines.emulated_link.kernel import after_combine, after_dispatch

    ids = torch.randint(-1, 72, (3000, 8), device="cuda")
    count = torch.zeros(1, dtype=torch.int64, device="cuda")
    want = remote_copies(ids, 18, 1, per_expert)
    picoseconds = 100_000

    def run() -> None:
        after_dispatch(ids, count, 18, 1, picoseconds, per_expert)
        after_combine(count, picoseconds)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    count.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    assert torch.equal(count, want)
    wanted_ms = 2 * int(want) * picoseconds / 1e9
    assert wanted_ms <= begin.elapsed_time(end) < 1.2 * wanted_ms + 0.1
