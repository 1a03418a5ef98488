"""DeepEP's published figures as points to fit and to check: the link bytes of its test scripts' random routing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.simulate.calibration import LinkBytes, link_bytes
from sglang_eplb_affinity.simulate.traffic import BatchTraffic, batch_traffic


@dataclass(frozen=True)
class Point:
    """One measured time. ``key`` is "mode.phase"; ``fit``: used to fit, else to check."""

    calibration: str
    key: str
    label: str
    us: float
    load: LinkBytes
    fit: bool
    source: str


def random_tokens(
    tokens: int, experts: int, top_k: int, gpus: int, nodes: int, limited_nodes: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(int16 [tokens * gpus, k], int32 source) as DeepEP's tests draw them: normal scores, best nodes first."""
    rng = np.random.default_rng(seed)
    total = tokens * gpus
    out = np.empty((total, top_k), np.int16)
    for start in range(0, total, 1 << 14):
        scores = np.abs(rng.standard_normal((min(1 << 14, total - start), experts), dtype=np.float32)) + 1
        if limited_nodes and nodes > limited_nodes:
            by_node = scores.reshape(len(scores), nodes, -1)
            best = np.argpartition(-by_node.max(2), limited_nodes, axis=1)[:, :limited_nodes]
            keep = np.zeros((len(scores), nodes, 1), np.float32)
            np.put_along_axis(keep, best[:, :, None], 1.0, axis=1)
            scores = (by_node * keep).reshape(len(scores), experts)
        out[start : start + len(scores)] = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
    return out, np.repeat(np.arange(gpus, dtype=np.int32), tokens)


def published_points(most_tokens: int = 1 << 15) -> Iterator[Point]:
    """All points of deepep_published.yaml. Large batches are drawn thinner and scaled."""
    text = Path(__file__).with_name("deepep_published.yaml").read_text()
    for table in yaml.safe_load(text):
        traffic: dict[int, tuple[BatchTraffic, float]] = {}
        for row in table["rows"]:
            gpus = row["gpus"]
            if gpus not in traffic:
                traffic[gpus] = _random_traffic(table, gpus, most_tokens)
            yield _point(table, row, *traffic[gpus])


def _random_traffic(table: dict[str, Any], gpus: int, most_tokens: int) -> tuple[BatchTraffic, float]:
    nodes = max(1, gpus // table["gpus_per_node"])
    topology = Topology(gpus, nodes)
    experts = table.get("experts") or table["experts_per_gpu"] * gpus
    drawn = min(table["tokens"], max(1, most_tokens // gpus))
    tokens, source = random_tokens(drawn, experts, table["top_k"], gpus, nodes, table["limited_nodes"])
    expert_map = ExpertMap.contiguous(1, experts, experts)
    return batch_traffic(tokens, source, expert_map, 0, topology, "static"), table["tokens"] / drawn


def _point(table: dict[str, Any], row: dict[str, Any], traffic: BatchTraffic, scale: float) -> Point:
    gpus, hidden = row["gpus"], table["hidden"]
    size = hidden * (1 + 4 / 128) if row["dtype"] == "fp8" else hidden * 2
    # Uniform random routing: the busiest GPU is the mean one but for sampling noise, which a thinner draw exaggerates.
    counters = np.repeat(traffic.counters.mean(1, keepdims=True), gpus, axis=1)
    peers = min(gpus, table["gpus_per_node"]) - 1
    load = link_bytes(counters * scale, table["mode"], row["phase"], size, table["tokens"], peers)
    if "us" in row:
        us = float(row["us"])
    else:
        copies = traffic.gpu_fanout
        if row["link"] == "rdma":
            copies = traffic.node_fanout  # the own node counts although nothing travels there
        us = table["tokens"] * copies * size / (row["gb_per_s"] * 1e3)
    key = f"{table['mode']}.{row['phase']}"
    label = f"EP{gpus}, {table['tokens']} tokens, hidden {hidden}, {row['dtype']}"
    return Point(table["calibration"], key, label, us, load, bool(row["fit"]), table["source"])
