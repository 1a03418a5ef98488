"""What a plan gains and costs, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.expert_map import ExpertMap


@dataclass(frozen=True)
class MapQuality:
    """One map on the plan sample under the server's dispatch rule; float64 [layers] each, nan without traffic.

    ``load_max_over_mean`` takes each expert's load from all tokens of the window and each replica's share of it from
    the sample; ``cost`` is the planner's objective in copies to another GPU per token.
    """

    gpu_fanout: np.ndarray
    node_fanout: np.ndarray
    load_max_over_mean: np.ndarray
    cost: np.ndarray


@dataclass(frozen=True)
class PlanReport:
    """Before and after.

    ``eplb``: EPLB's own placement of the same window; ``current``: the map in use, if one was given; ``planned``: the
    new one. ``fallback`` [layers]: why a layer did not get a searched map ("" where it did). ``moved_experts`` int64
    [layers]: experts newly placed on a GPU, or None without a current map. ``seconds``: wall time of the whole plan.
    ``uncovered``: for a plan that is to survive a loss, (experts, share of the traffic) of each layer that one rank or
    node takes along; float64 [layers, 2].
    """

    eplb: MapQuality
    planned: MapQuality
    current: MapQuality | None
    fallback: tuple[str, ...]
    moved_experts: np.ndarray | None
    seconds: float
    uncovered: np.ndarray | None = None

    def summary(self) -> str:
        """One line for a log."""

        def change(name: str) -> str:
            after = _mean(getattr(self.planned, name))
            if name != "load_max_over_mean" and not after:  # a token's fan-out is at least 1
                return "unknown (counts only)"
            parts = [f"{after:.3f} (EPLB {_mean(getattr(self.eplb, name)):.3f}"]
            if self.current is not None:
                parts.append(f", before {_mean(getattr(self.current, name)):.3f}")
            return "".join(parts) + ")"

        reasons = sorted({reason for reason in self.fallback if reason})
        kept = sum(bool(reason) for reason in self.fallback)
        text = (
            f"planned {len(self.fallback)} layers in {self.seconds:.2f} s: GPU fan-out {change('gpu_fanout')}, "
            f"node fan-out {change('node_fanout')}, load max/mean {change('load_max_over_mean')}"
        )
        if self.moved_experts is not None:
            text += f", {int(self.moved_experts.sum())} experts move"
        if self.uncovered is not None:
            layer = int(self.uncovered[:, 1].argmax())
            experts, share = self.uncovered[layer]
            mean = self.uncovered.mean(0)
            if self.uncovered[:, 0].any():
                text += (
                    f"; {experts:.0f} experts with {100 * share:.1f} % of the traffic do not survive in layer {layer}, "
                    f"the worst ({mean[0]:.1f} and {100 * mean[1]:.1f} % on average)"
                )
            else:
                text += "; every expert survives in all layers"
        if kept:
            text += f"; {kept} layers not searched or not improved ({'; '.join(reasons)})"
        return text

    def to_json(self) -> dict[str, Any]:
        """Per-layer lists and their means."""
        out: dict[str, Any] = {"seconds": self.seconds, "fallback": list(self.fallback)}
        for name in ("eplb", "current", "planned"):
            quality = getattr(self, name)
            if quality is not None:
                out[name] = {key: getattr(quality, key).tolist() for key in MapQuality.__dataclass_fields__}
                out[name]["mean"] = {key: _mean(getattr(quality, key)) for key in MapQuality.__dataclass_fields__}
        if self.uncovered is not None:
            out["uncovered_experts"] = self.uncovered[:, 0].astype(int).tolist()
            out["uncovered_traffic"] = self.uncovered[:, 1].tolist()
        out["moved_experts"] = None if self.moved_experts is None else self.moved_experts.tolist()
        return out


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


@dataclass(frozen=True)
class Plan:
    """The map to use and the report on it."""

    expert_map: ExpertMap
    report: PlanReport
