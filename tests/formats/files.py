"""One small valid file of every format: 3 MoE layers of 16 experts, top-4, 120 tokens, maps for 4 GPUs."""

from __future__ import annotations

import base64
import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.affinity_entry import window_to_dump
from sglang_eplb_affinity.formats.maps import save_map
from tests.formats.test_dumps import per_token
from tests.planner.windows import skewed_tokens, window_of

torch = pytest.importorskip("torch", reason="SGLang's dumps are torch files")

LAYERS, EXPERTS, K, TOKENS, SLOTS, GPUS = 3, 16, 4, 120, 20, 4
KINDS = {
    "trace.npz": "trace",
    "map.json": "map", "map.pt": "map", "ascend.json": "map", "trt.yaml": "map",
    "stat.pt": "counts", "steps.json": "counts", "counts.json": "counts", "per_pass.pt": "counts",
    "per_token.pt": "tokens", "ours.pt": "tokens",
    "sglang.jsonl": "responses", "vllm.jsonl": "responses",
}  # fmt: skip
"""File name to what it holds: a trace, a map, a dump of counts or of token sets, or responses of a server."""
ALL = tuple(KINDS) + tuple(f"{name}.gz" for name in KINDS)


def kind_of(name: str) -> str:
    return KINDS[name.removesuffix(".gz")]


def npy(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def write_all(folder: Path) -> dict[str, bytes]:
    """All files, packed ones too, by name."""
    tokens = skewed_tokens(np.random.default_rng(0), LAYERS, TOKENS, EXPERTS, K)
    ids = np.ascontiguousarray(tokens.transpose(1, 0, 2))
    window = window_of(tokens, EXPERTS)
    start = ExpertMap.contiguous(LAYERS, EXPERTS, SLOTS)
    sequence = np.arange(TOKENS, dtype=np.int32) // 10
    RoutingTrace(ids, EXPERTS, sequence, (sequence % 2).astype(np.int8), ("code", "text")).save(folder / "trace.npz")
    save_map(start, folder / "map.json", "sglang")
    save_map(start, folder / "map.pt", "sglang")
    save_map(start, folder / "ascend.json", "vllm-ascend", Topology(GPUS))
    save_map(start, folder / "trt.yaml", "tensorrt-llm")
    counts = torch.from_numpy(window.counts)
    steps = torch.stack([counts // 3, counts - counts // 3]).int()
    torch.save({"rank": 0, "logical_count": steps, "average_utilization_rate_over_window": None}, folder / "stat.pt")
    (folder / "steps.json").write_text(json.dumps({"logical_count": steps.tolist()}))
    (folder / "counts.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    detail = per_token(tokens, start)
    torch.save(detail, folder / "per_token.pt")
    slots = torch.zeros(LAYERS, SLOTS, dtype=torch.int32)
    slots[:, :EXPERTS] = counts
    torch.save({**detail, "records": [{"rank": 0, "global_physical_count": slots}]}, folder / "per_pass.pt")
    torch.save({"rank": 0, "logical_count": steps, "affinity": window_to_dump(window)}, folder / "ours.pt")
    half = TOKENS // 2
    usage = {"prompt_tokens": half - 9, "completion_tokens": 10}
    lines: dict[str, list[dict[str, Any]]] = {"sglang.jsonl": [], "vllm.jsonl": []}
    for part in (ids[:half], ids[half:]):
        coded = base64.b64encode(part.astype("<i4").tobytes()).decode()
        lines["sglang.jsonl"].append({"text": "\u2028", "meta_info": {"routed_experts": coded, **usage}})
        lines["vllm.jsonl"].append({"choices": [{"routed_experts": npy(part.astype(np.uint8))}], "usage": usage})
    for name, responses in lines.items():
        text = "".join(json.dumps(response, ensure_ascii=False) + "\n" for response in responses)
        (folder / name).write_text(text)
    files = {name: (folder / name).read_bytes() for name in KINDS}
    for name, data in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(data))
    return {name: (folder / name).read_bytes() for name in ALL}


def broken(data: bytes, rng: np.random.Generator) -> bytes:
    """``data`` with one to three bytes changed; sometimes also cut short or with its start once more at its end."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(len(changed))] = rng.integers(256)
    if rng.random() < 0.2:
        del changed[rng.integers(len(changed)) :]
    elif rng.random() < 0.1:
        changed += changed[: rng.integers(len(changed))]
    return bytes(changed)


ODD = (
    "3",
    1.5,
    float("nan"),
    float("inf"),
    -1,
    -(10**30),
    10**30,
    1 << 40,
    [],
    {},
    None,
    True,
    "",
    [[]],
    "NaN",
    0,
    10**9,
)
"""What stands where a number or a list should: texts, floats, NaN, negative or huge numbers, nothing at all."""


def with_odd_value(content: Any, rng: np.random.Generator) -> Any:
    """A copy of JSON ``content`` in which one node, at any depth, is one of ODD, twice there, or gone."""
    copied = json.loads(json.dumps(content))
    node = copied
    while isinstance(node, (list, dict)) and node:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[rng.integers(len(keys))]
        if not isinstance(node[key], (list, dict)) or not node[key] or rng.random() < 0.25:
            what = rng.random()
            if what < 0.1:
                del node[key]
            elif what < 0.2 and isinstance(node, list):
                node.append(node[key])
            else:
                node[key] = ODD[rng.integers(len(ODD))]
            break
        node = node[key]
    return copied
