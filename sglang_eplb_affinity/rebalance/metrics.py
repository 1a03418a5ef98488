"""Prometheus metrics of placement: their names, and the round observer that fills them.

Only the process of rank 0 has them. SGLang's processes share metrics through files (prometheus_client's multiprocess
mode), and /metrics joins the files: counters and histograms add up, gauges are written once a round with mode
``mostrecent``, which keeps no label of the process. docs/observability.md says what each value means.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sglang_eplb_affinity.dispatch.evaluate import moved_experts
from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.layer_figures import FIGURES, LayerFigures
from sglang_eplb_affinity.rebalance.delivery import OF_MAP, Delivery
from sglang_eplb_affinity.rebalance.round_record import Result, RoundRecord

PREFIX = "eplb_affinity_"
RESULTS: tuple[Result, ...] = ("applied", "unchanged", "skipped", "failed")
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_COMMIT_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)


@dataclass(frozen=True)
class Metric:
    """``name`` without the prefix and, for counters, without the ``_total`` that Prometheus adds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name to query; a histogram has _bucket, _sum and _count of it."""
        return PREFIX + self.name + ("_total" if self.kind == "counter" else "")


_FIGURES = {
    "load": "Most loaded GPU over mean",
    "gpu_fanout": "Distinct GPUs per token and layer",
    "node_fanout": "Distinct nodes per token and layer",
    "cost": "The plan's objective, in copies to another GPU per token and layer,",
}
_OF_MAP = {
    "promised": "of the map in force on the window that it was planned on.",
    "delivered": "of the map in force on the last window.",
    "previous_map": "of the map before it on the last window.",
    "best_map": "of the best map that each layer has had on the last window.",
}

METRICS: tuple[Metric, ...] = (
    Metric("rebalances", "counter", "Rebalance rounds by result.", ("result",)),
    Metric("phase_seconds", "histogram", "Seconds of a round by phase; total is the whole.", ("phase",), _SECONDS),
    Metric("commit_seconds", "histogram", "Seconds that forward passes stood still for a layer.", (), _COMMIT_SECONDS),
    Metric("moved_experts", "counter", "Experts whose weights came from another GPU."),
    Metric("moved_bytes", "counter", "Bytes of weights of moved experts, over all ranks."),
    Metric("committed_layers", "counter", "Layers whose map changed."),
    Metric("balancedness", "gauge", "Mean over most loaded GPU on the last window; 1 is perfect.", ("map",)),
    Metric("gpu_fanout", "gauge", "Distinct GPUs per token and layer on the last window.", ("map",)),
    Metric("node_fanout", "gauge", "Distinct nodes per token and layer on the last window.", ("map",)),
    Metric("remote_gpu_copies", "gauge", "Copies of a token to other GPUs per layer on the last window.", ("map",)),
    Metric("remote_node_copies", "gauge", "Copies of a token to other nodes per layer on the last window.", ("map",)),
    *(Metric(f"{of}_{name}", "gauge", f"{_FIGURES[name]} {_OF_MAP[of]}") for of in OF_MAP for name in FIGURES),
    Metric("layer_regret", "gauge", "By what fraction the map in force is worse than the layer's best.", ("layer",)),
    Metric("regret", "gauge", "Mean over layers of layer_regret."),
    Metric("returned_layers", "counter", "Layers that went back to their best map."),
    Metric("window_tokens", "gauge", "Token-expert assignments of the last window, layer that has most."),
    Metric("relocated_experts", "gauge", "Slots whose expert is not on the GPU of SGLang's start placement."),
    Metric("last_round_timestamp_seconds", "gauge", "Unix time of the end of the last round."),
    Metric("last_commit_timestamp_seconds", "gauge", "Unix time of the last change of the map; start-up counts."),
)


@dataclass
class PlacementMetrics:
    """A round observer. ``labels``: of every sample, such as the model's name; ``in_force``: the map at start-up."""

    labels: Mapping[str, str]
    topology: Topology
    in_force: ExpertMap
    registry: Any = None  # prometheus_client's CollectorRegistry; None: its default
    _metrics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # After PROMETHEUS_MULTIPROC_DIR is set: prometheus_client reads it when it is imported.
        import prometheus_client

        classes = {
            "counter": prometheus_client.Counter,
            "gauge": prometheus_client.Gauge,
            "histogram": prometheus_client.Histogram,
        }
        for metric in METRICS:
            options: dict[str, Any] = {"multiprocess_mode": "mostrecent"} if metric.kind == "gauge" else {}
            if metric.buckets:
                options["buckets"] = metric.buckets
            if self.registry is not None:
                options["registry"] = self.registry
            names = (*self.labels, *metric.labels)
            self._metrics[metric.name] = classes[metric.kind](PREFIX + metric.name, metric.help, names, **options)
        for result in RESULTS:  # so that rates see the first failure as a change from 0
            self._of("rebalances", result=result).inc(0)
        for name in ("moved_experts", "moved_bytes", "committed_layers", "returned_layers"):
            self._of(name).inc(0)
        self._of("commit_seconds")
        self._of("last_commit_timestamp_seconds").set(time.time())
        self._set_relocated(self.in_force)

    def round_finished(self, record: RoundRecord, in_force: ExpertMap) -> None:
        now = time.time()
        self._of("rebalances", result=record.result).inc()
        for phase, seconds in record.phase_seconds.items():
            self._of("phase_seconds", phase=phase).observe(seconds)
        self._of("phase_seconds", phase="total").observe(record.seconds)
        for milliseconds in record.commit_ms:
            self._of("commit_seconds").observe(milliseconds / 1000)
        self._of("moved_experts").inc(record.moved_experts)
        self._of("moved_bytes").inc(record.moved_bytes or 0)
        self._of("committed_layers").inc(len(record.committed_layers))
        for name, figures in (("contiguous", record.contiguous), ("before", record.before), ("after", record.after)):
            if figures is not None:
                self.set_figures(name, figures)
        if record.delivery is not None:
            self._set_delivery(record.delivery)
        self._of("window_tokens").set(record.tokens)
        self._of("last_round_timestamp_seconds").set(now)
        if record.committed_layers:
            self._of("last_commit_timestamp_seconds").set(now)
            if in_force.num_slots == self.in_force.num_slots:  # not so while ranks are gone
                self._set_relocated(in_force)

    def set_figures(self, name: str, figures: MapFigures) -> None:
        """Of the map ``name``: contiguous, before or after."""
        for key in MapFigures.__dataclass_fields__:
            self._of(key, map=name).set(getattr(figures, key))

    def set_means(self, of: str, figures: LayerFigures) -> None:
        """``of``: a name of OF_MAP."""
        for name, value in figures.means().items():
            self._of(f"{of}_{name}").set(value)

    def _set_delivery(self, delivery: Delivery) -> None:
        for of, figures in delivery.figures():
            self.set_means(of, figures)
        for layer, value in enumerate(delivery.regret):
            if value == value:  # nan without traffic
                self._of("layer_regret", layer=str(layer)).set(value)
        self._of("regret").set(delivery.mean_regret)
        self._of("returned_layers").inc(len(delivery.returned))

    def _of(self, name: str, **labels: str) -> Any:
        values = {**self.labels, **labels}
        return self._metrics[name].labels(**values) if values else self._metrics[name]

    def _set_relocated(self, expert_map: ExpertMap) -> None:
        home = ExpertMap.contiguous(expert_map.num_layers, expert_map.num_experts, expert_map.num_slots)
        self._of("relocated_experts").set(int(moved_experts(home, expert_map, self.topology).sum()))
