"""Measures the placement of a server that never rebalances, and so never logs it: record, send, dump, evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.load import send_all
from bench.profile import LoadConfig, ServerConfig
from bench.server import Server
from sglang_eplb_affinity.errors import InputError
from sglang_eplb_affinity.evaluate import measure
from sglang_eplb_affinity.expert_map import ExpertMap
from sglang_eplb_affinity.routing import RoutingWindow
from sglang_eplb_affinity.topology import Topology

# SGLang writes its recorder's dumps here; rank 0 alone writes, so one file a dump.
DUMP_FOLDER_VARIABLE = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"

Placement = dict[str, float]


class ProbeFailed(RuntimeError):
    """The server could not say what its placement is worth; the run goes on without the figure."""


def probe_placement(
    server: Server, prompts: Sequence[str], load: LoadConfig, config: ServerConfig, dumps: Path
) -> Placement:
    """Balancedness and fan-outs of the placement a server without EPLB keeps, on these prompts.

    That placement is SGLang's `trivial` one without redundant experts. Recording stops again before it returns.
    """
    dumps.mkdir(parents=True, exist_ok=True)
    before = set(dumps.glob("*.pt"))
    try:
        server.post("/start_expert_distribution_record")
        send_all(server, prompts, load.output_tokens, concurrency=min(len(prompts), 8))
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
        return placement_of(window, Topology(config.ranks, config.nodes))
    except InputError as error:
        raise ProbeFailed(str(error)) from None
    finally:
        dump.unlink()


def read_dump(path: Path) -> RoutingWindow:
    """The affinity window of a recorder dump; raises InputError when it has none."""
    import torch

    from sglang_eplb_affinity.sglang_hooks.recording import window_of_dump

    data = torch.load(path, weights_only=True, map_location="cpu")
    if "affinity" not in data:
        raise InputError("the dump has no `affinity` entry (is SGLang patched?)")
    return window_of_dump(data["affinity"])


def placement_of(window: RoutingWindow, topology: Topology) -> Placement:
    """Figures of the contiguous map without redundant experts, mean over the layers that have experts."""
    layers = np.flatnonzero(window.counts.any(axis=1))
    if window.tokens is None or not len(layers):
        raise InputError("the dump has no tokens")
    expert_map = ExpertMap.contiguous(len(layers), window.num_experts, window.num_experts)
    traffic = measure(window.tokens[layers], expert_map, topology, "dynamic", None)
    return {
        "balancedness": float((1 / traffic.load_max_over_mean).mean()),
        "gpu_fanout": float(traffic.gpu_fanout.mean()),
        "node_fanout": float(traffic.node_fanout.mean()),
    }
