"""What ``inspect`` shows of routing: load, co-activation and fan-out, as text and as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_eplb_affinity.dispatch.evaluate import NO_PASS_LOAD, ONE_PASS, dealt_sources, even_load, measure_layer
from sglang_eplb_affinity.dispatch.rule_tables import tables_of_rule
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology

BAR = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_SHADES = " ▁▂▃▄▅▆▇█"
_PAIRS = 5


@dataclass(frozen=True)
class LayerPicture:
    """One layer. ``expert_load`` int64 [experts]; the rest is None where the recording or the map does not tell it.

    ``pairs``: (expert, expert, tokens that chose both, times more often than independent experts would).
    ``gpu_load`` float64 [gpus]; ``fanout`` int64 [GPUs + 1]: sampled tokens by the number of GPUs they visit.
    """

    layer: int
    expert_load: np.ndarray
    pairs: tuple[tuple[int, int, int, float], ...] | None
    gpu_load: np.ndarray | None
    fanout: np.ndarray | None

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "expert_load": self.expert_load.tolist(),
            "coactivation": None if self.pairs is None else [
                {"experts": [a, b], "tokens": tokens, "lift": lift} for a, b, tokens, lift in self.pairs
            ],
            "gpu_load": None if self.gpu_load is None else self.gpu_load.tolist(),
            "gpu_fanout_tokens": None if self.fanout is None else self.fanout.tolist(),
        }  # fmt: skip

    def text(self) -> str:
        """Bars and numbers for a terminal."""
        load = self.expert_load
        lines = [f"layer {self.layer}: load by expert, each a column ({load.max()} assignments at the top)"]
        lines += ["  " + row for row in _columns(load)]
        if self.gpu_load is not None:
            mean = self.gpu_load.mean()
            lines.append(f"load by GPU (max/mean {self.gpu_load.max() / max(mean, 1e-9):.3f}):")
            lines += [f"  GPU {gpu:3d} {_bar(value / max(self.gpu_load.max(), 1e-9))} {value / max(mean, 1e-9):.3f}"
                      for gpu, value in enumerate(self.gpu_load)]  # fmt: skip
        if self.fanout is not None:
            total = max(int(self.fanout.sum()), 1)
            lines.append(f"GPU fan-out of {total} tokens:")
            lines += [f"  {gpus:3d} GPUs {_bar(count / total)} {100 * count / total:.1f} %"
                      for gpus, count in enumerate(self.fanout) if count]  # fmt: skip
        if self.pairs is None:
            lines.append("experts that fire together: unknown, the recording holds counts only")
        else:
            lines.append("pairs that fire together most, and how much more often than independent experts would")
            lines += [f"  experts {a} and {b}: {tokens} tokens, {lift:.2f} times" for a, b, tokens, lift in self.pairs]
        return "\n".join(lines)


def picture_of(
    window: RoutingWindow, layer: int, expert_map: ExpertMap | None, topology: Topology | None, rule: DispatchRule
) -> LayerPicture:
    """One layer of ``window``, under ``expert_map`` (with the window's layers) if there is one."""
    gpu_load = fanout = None
    if expert_map is not None and topology is not None:
        one = ExpertMap(expert_map.physical_to_logical[layer : layer + 1], expert_map.num_experts)
        gpu_load = even_load(window.counts[layer : layer + 1], one, topology)[0]
        if window.tokens is not None and window.tokens.size:
            fanout = _fanout(window.tokens[layer], one, topology, rule)
    return LayerPicture(layer, window.counts[layer], _pairs(window, layer), gpu_load, fanout)


def _fanout(tokens: np.ndarray, one: ExpertMap, topology: Topology, rule: DispatchRule) -> np.ndarray:
    """int64 [GPUs + 1]: tokens int16 [T, k] by their fan-out under the map's one layer."""
    used = np.ascontiguousarray(tokens[(tokens >= 0).any(1)], dtype=np.int16)
    slots_per_gpu = topology.slots_per_gpu(one.num_slots)
    chosen = np.full(used.shape, -1, np.int16)
    table, replicas, number = tables_of_rule(one, topology, rule)
    measure_layer(
        used, dealt_sources(len(used), topology), table[0], replicas[0],
        slots_per_gpu, topology.gpus_per_node, topology.num_nodes, int(number), np.zeros(5, np.int64),
        np.zeros(one.num_slots, np.int64), chosen, ONE_PASS, NO_PASS_LOAD,
    )  # fmt: skip
    gpus = np.sort(np.where(chosen >= 0, chosen // slots_per_gpu, -1), axis=1)
    fanout = ((gpus[:, 1:] != gpus[:, :-1]).sum(1) + 1) - (gpus[:, 0] < 0)
    return np.bincount(fanout, minlength=topology.num_gpus + 1).astype(np.int64)


def _pairs(window: RoutingWindow, layer: int) -> tuple[tuple[int, int, int, float], ...] | None:
    if window.coactivation is None:
        return None
    upper = np.triu(window.coactivation[layer], 1)
    counts = window.counts[layer]
    tokens = tokens_of(window, layer)
    found = []
    for flat in np.argsort(-upper, axis=None, kind="stable")[:_PAIRS]:
        a, b = divmod(int(flat), window.num_experts)
        if upper[a, b]:
            found.append((a, b, int(upper[a, b]), float(upper[a, b] * tokens / (counts[a] * counts[b]))))
    return tuple(found)


def tokens_of(window: RoutingWindow, layer: int) -> float:
    """Tokens of the window in one layer: its assignments over the experts of a token."""
    k = 1 if window.tokens is None else int((window.tokens[layer] >= 0).sum(1).max(initial=1))
    return float(window.counts[layer].sum() / max(k, 1))


def _bar(share: float) -> str:
    eighths = round(share * BAR * 8)
    whole, rest = divmod(min(max(eighths, 0), BAR * 8), 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(BAR)


def _columns(load: np.ndarray, width: int = 96, height: int = 4) -> list[str]:
    """Rows of a column chart, 96 experts in each block."""
    rows = []
    top = max(int(load.max()), 1)
    for start in range(0, len(load), width):
        part = load[start : start + width] / top * height
        for level in range(height - 1, -1, -1):
            rows.append("".join(_SHADES[int(np.clip(round((v - level) * 8), 0, 8))] for v in part).rstrip())
        rows.append(f"expert {start} to {min(start + width, len(load)) - 1}")
    return rows
