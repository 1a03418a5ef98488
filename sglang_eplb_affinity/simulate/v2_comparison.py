"""A decode server with DeepEP V2 beside the setting that is recommended with V1.

V2 (SGLang 0.5.23, ``--moe-a2a-backend deepep_v2``) sends a token once per rank in decode too. It is compared and not
recommended: its constants were measured on two GPUs of one host, and beyond it they are assumptions
(bench.calibration.calibrate, ``assumed_v2``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_eplb_affinity.simulate.recommend import Candidate, candidate_runs, evaluate_candidates, gain
from sglang_eplb_affinity.simulate.scenario import Interval
from sglang_eplb_affinity.simulate.source import RoutingSource
from sglang_eplb_affinity.simulate.system import DeepEPMode, System

_MODES: tuple[DeepEPMode, ...] = ("v2",)


@dataclass(frozen=True)
class V2Comparison:
    """``eplb`` and ``affinity``: the best with V2. ``over_eplb``: affinity's gain there; ``over_v1``: over ``v1``."""

    v1: Candidate
    eplb: Candidate
    affinity: Candidate
    over_eplb: Interval
    over_v1: Interval

    @property
    def text(self) -> str:
        def of(c: Candidate) -> str:
            return f"{c.step_ms().mean():.1f} ms"

        a, e = self.affinity.result, self.eplb.result
        return (
            "with DeepEP V2 (--moe-a2a-backend deepep_v2; constants of 2 GPUs, assumed beyond): "
            f"EPLB {of(self.eplb)}, affinity with "
            f"{a.redundant} redundant experts {of(self.affinity)}, {_text(self.over_eplb)} over EPLB, GPU fan-out "
            f"{e.gpu_fanout:.2f} to {a.gpu_fanout:.2f}; against the above ({of(self.v1)}): {_text(self.over_v1)}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "constants": "measured on 2 GPUs of a host, assumed beyond",
            "eplb_step_ms": float(self.eplb.step_ms().mean()),
            "affinity_step_ms": float(self.affinity.step_ms().mean()),
            "redundant_experts": self.affinity.result.redundant,
            "gain_pct_over_eplb": dataclasses.asdict(self.over_eplb),
            "gain_pct_over_v1": dataclasses.asdict(self.over_v1),
        }


def compare_v2(
    system: System, source: RoutingSource, v1: Candidate, tokens: int, resamples: int,
    progress: Callable[[int], object] | None = None, redundancies: Sequence[int] | None = None,
) -> V2Comparison:  # fmt: skip
    """Decode with V2 on the same batches as ``v1``, the setting chosen among V1's."""
    with_v2 = dataclasses.replace(system.serving, decode_mode="v2", overlap="none")
    candidates = evaluate_candidates(
        dataclasses.replace(system, serving=with_v2), source, "decode", tokens, resamples, progress, redundancies,
        modes=_MODES,
    )  # fmt: skip
    eplb, affinity = (
        min((c for c in candidates if c.result.algorithm == name), key=lambda c: float(c.step_ms().mean()))
        for name in ("eplb", "affinity")
    )
    return V2Comparison(v1, eplb, affinity, gain(affinity, eplb), gain(affinity, v1))


def comparison_runs(system: System, tokens: int, resamples: int, redundancies: Sequence[int] | None = None) -> int:
    """How often :func:`compare_v2` reports progress."""
    return candidate_runs(system, "decode", tokens, resamples, redundancies, modes=_MODES)


def _text(interval: Interval) -> str:
    return f"{interval.value:+.1f} % [{interval.lower:+.1f}, {interval.upper:+.1f}]"
