"""Measures the placement of a server that never rebalances, and so never logs it: record, send, dump, evaluate."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench.harness.load import send_all
from bench.harness.profile import ServerConfig
from bench.harness.server import Server
from bench.harness.workload import Workload
from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.domain.content import read_content
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.affinity_entry import window_of_dump

# SGLang writes its recorder's dumps here; rank 0 alone writes, so one file a dump.
DUMP_FOLDER_VARIABLE = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"

MAX_KEPT_TOKENS = 4096
Placement = dict[str, float]


class ProbeFailed(RuntimeError):
    """The server could not say what its placement is worth; the run goes on without the figure."""


def probe_placement(server: Server, work: Workload, config: ServerConfig, dumps: Path, keep: Path) -> Placement:
    """Balancedness and fan-outs of the placement a server without EPLB keeps, on these requests.

    That placement is SGLang's `trivial` one without redundant experts. Recording stops again before it returns. What
    was recorded is kept as ``keep``, for plots, unless it is there already.
    """
    dumps.mkdir(parents=True, exist_ok=True)
    before = set(dumps.glob("*.pt"))
    try:
        server.post("/start_expert_distribution_record")
        send_all(server, work, concurrency=min(work.requests, 64))
        server.post("/stop_expert_distribution_record")
        server.post("/dump_expert_distribution_record")
    except OSError as error:
        raise ProbeFailed(f"the recorder's endpoints failed ({error})") from None
    written = set(dumps.glob("*.pt")) - before
    if len(written) != 1:
        raise ProbeFailed(f"expected one new dump, found {len(written)}")
    dump = written.pop()
    try:
        window = read_dump(dump)
        if not keep.is_file():
            save_window(window, keep)
        return placement_of(window, Topology(config.ranks, config.nodes))
    except InputError as error:
        raise ProbeFailed(str(error)) from None
    finally:
        dump.unlink()


def read_dump(path: Path) -> RoutingWindow:
    """The affinity window of a recorder dump; raises InputError when it has none."""
    data = read_content(path)
    if not isinstance(data, dict) or "affinity" not in data:
        raise InputError("the dump has no `affinity` entry (is SGLang patched?)")
    return window_of_dump(data["affinity"], str(path))


def placement_of(window: RoutingWindow, topology: Topology) -> Placement:
    """Figures of the contiguous map without redundant experts, mean over the layers that have experts."""
    layers, experts = window.counts.shape
    # Without replicas every rule picks alike; under `dynamic` no token needs a source.
    figures = MapFigures.of(window, ExpertMap.contiguous(layers, experts, experts), topology, "dynamic")
    if figures is None:
        raise InputError("the dump has no tokens")
    return asdict(figures)


def save_window(window: RoutingWindow, path: Path) -> None:
    """As a compressed .npz of at most MAX_KEPT_TOKENS sampled tokens, the layers that recorded nothing left out."""
    layers = np.flatnonzero(window.counts.any(axis=1))
    assert window.coactivation is not None and window.tokens is not None
    tokens = window.tokens[layers]
    real = tokens[:, (tokens[:, :, 0] >= 0).all(axis=0)]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        counts=window.counts[layers],
        coactivation=window.coactivation[layers],
        tokens=real[:, :MAX_KEPT_TOKENS],
    )
    write_atomically(path, buffer.getvalue())


def load_window(path: Path) -> RoutingWindow:
    """What :func:`save_window` wrote."""
    with np.load(path, allow_pickle=False) as data:
        return RoutingWindow(data["counts"], data["coactivation"], data["tokens"])
