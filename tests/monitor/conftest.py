"""Servers as the metrics of this package export them, without SGLang."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.monitor.reading import Reading
from sglang_eplb_affinity.monitor.samples import Samples
from sglang_eplb_affinity.rebalance.metrics import PlacementMetrics
from sglang_eplb_affinity.rebalance.round_record import Result, RoundRecord

HOME = ExpertMap.contiguous(2, 4, 4)
SWAPPED = ExpertMap(np.array([[0, 1, 2, 3], [2, 1, 0, 3]]), 4)


@dataclass
class Exporter:
    """``dp_rank`` None: one map for all replicas."""

    dp_rank: str | None = None
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    rounds: int = 0

    def __post_init__(self) -> None:
        labels = {"model_name": "models/tiny"} | ({"dp_rank": self.dp_rank} if self.dp_rank is not None else {})
        self.metrics = PlacementMetrics(labels, Topology(2), HOME, self.registry)
        self.ttft = Histogram("sglang:time_to_first_token_seconds", "s", registry=self.registry, buckets=(0.1, 1))
        self.tpot = Histogram("sglang:inter_token_latency_seconds", "s", registry=self.registry, buckets=(0.01, 0.1))
        for name in ("num_running_reqs", "num_queue_reqs"):
            Gauge(f"sglang:{name}", name, registry=self.registry).set(3)

    def end_round(self, result: Result, balancedness: float = 0.9, moved: int = 2) -> RoundRecord:
        self.rounds += 1
        figures = {
            name: MapFigures(value, 1.5, 1.25, 0.75, 0.5)
            for name, value in (("contiguous", 0.5), ("before", 0.6), ("after", balancedness))
        }
        record = RoundRecord(
            result, "affinity", self.rounds, moved_experts=moved, moved_bytes=1024 * moved,
            committed_layers=(1,) if moved else (), seconds=0.25,
            reason="rank 1 failed" if result == "failed" else None,
            **(figures if result in ("applied", "unchanged") else {}),
        )  # fmt: skip
        self.metrics.round_finished(record, SWAPPED)
        return record

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def reading(self, time: float = 0.0, record: RoundRecord | None = None) -> Reading:
        reading = Reading.of("http://a:1", time, Samples.parse(self.text(), "a"))
        return reading.with_records([{"eplb_affinity": record.to_json() if record else None}])


@pytest.fixture
def exporter() -> Exporter:
    return Exporter()
