"""What the metrics say after rounds, and that the dashboard and the documentation name exactly what is exported."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.layer_figures import LayerFigures
from sglang_eplb_affinity.rebalance.delivery import METRIC_NAMES, Delivery
from sglang_eplb_affinity.rebalance.metrics import METRICS, PREFIX, PlacementMetrics
from sglang_eplb_affinity.rebalance.round_record import RoundRecord

ROOT = Path(__file__).parents[2]
LABELS = {"model_name": "m"}
HOME = ExpertMap.contiguous(2, 4, 4)
SWAPPED = ExpertMap(np.array([[0, 1, 2, 3], [2, 1, 0, 3]]), 4)
NAN = float("nan")


def figures(load: float) -> LayerFigures:
    """Of two layers, of which the second has no traffic."""
    return LayerFigures(*(np.array([load + step, NAN]) for step in range(4)))


DELIVERY = Delivery(figures(1.25), np.array([0.25, NAN]), figures(1.0), figures(1.5), figures(0.5), returned=(0,))
RECORD = RoundRecord(
    "applied", "affinity", 1, tokens=120, moved_experts=2, moved_bytes=2048, committed_layers=(1,),
    contiguous=MapFigures(0.5, 2, 1.5, 1.0, 0.75), before=MapFigures(0.6, 1.9, 1.4, 0.95, 0.7),
    after=MapFigures(0.9, 1.5, 1.1, 0.75, 0.55), phase_seconds={"plan": 0.2, "move": 0.05}, seconds=0.3,
    commit_ms=(2.0, 4.0), delivery=DELIVERY,
)  # fmt: skip


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> PlacementMetrics:
    return PlacementMetrics(LABELS, Topology(2), HOME, registry)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(PREFIX + name, {**LABELS, **labels})


def test_before_the_first_round(metrics: PlacementMetrics, registry: CollectorRegistry) -> None:
    assert [value(registry, "rebalances_total", result=r) for r in ("applied", "failed")] == [0, 0]
    assert value(registry, "relocated_experts") == value(registry, "commit_seconds_count") == 0
    assert value(registry, "balancedness", map="after") is None
    assert abs((value(registry, "last_commit_timestamp_seconds") or 0) - time.time()) < 60


def test_an_applied_round(metrics: PlacementMetrics, registry: CollectorRegistry) -> None:
    metrics.round_finished(RECORD, SWAPPED)
    assert value(registry, "rebalances_total", result="applied") == 1
    assert value(registry, "moved_experts_total") == 2 and value(registry, "moved_bytes_total") == 2048
    assert value(registry, "committed_layers_total") == 1
    assert [value(registry, "balancedness", map=name) for name in ("contiguous", "before", "after")] == [0.5, 0.6, 0.9]
    assert value(registry, "remote_node_copies", map="after") == 0.55
    assert value(registry, "phase_seconds_sum", phase="plan") == 0.2
    assert value(registry, "phase_seconds_sum", phase="total") == 0.3
    assert value(registry, "commit_seconds_count") == 2
    assert value(registry, "commit_seconds_sum") == pytest.approx(0.006)
    assert value(registry, "relocated_experts") == 2 and value(registry, "window_tokens") == 120


def test_promise_and_delivery(metrics: PlacementMetrics, registry: CollectorRegistry) -> None:
    metrics.round_finished(RECORD, SWAPPED)
    loads = [value(registry, f"{of}_load") for of in ("promised", "delivered", "previous_map", "best_map")]
    assert loads == [1.0, 1.25, 1.5, 0.5]
    assert value(registry, "delivered_cost") == 4.25  # means leave the layer without traffic out
    assert value(registry, "layer_regret", layer="0") == value(registry, "regret") == 0.25
    assert value(registry, "layer_regret", layer="1") is None and value(registry, "returned_layers_total") == 1
    line = RECORD.to_json()
    assert {name: line[name] for name in METRIC_NAMES} == {name: value(registry, name) for name in METRIC_NAMES}
    assert (line["regret"], line["regret_by_layer"], line["returned_layers"]) == (0.25, {"0": 0.25}, [0])


def test_a_failed_round_changes_no_commit_time(metrics: PlacementMetrics, registry: CollectorRegistry) -> None:
    started = value(registry, "last_commit_timestamp_seconds")
    metrics.round_finished(RoundRecord("failed", "affinity", 1), HOME)
    assert value(registry, "rebalances_total", result="failed") == 1
    assert value(registry, "last_commit_timestamp_seconds") == started
    assert (value(registry, "last_round_timestamp_seconds") or 0) >= (started or 0)
    assert value(registry, "balancedness", map="before") is None


def exported_names() -> set[str]:
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    return {metric.exported + suffix for metric in METRICS for suffix in suffixes.get(metric.kind, ("",))}


def test_the_code_exports_the_names_it_lists(metrics: PlacementMetrics, registry: CollectorRegistry) -> None:
    metrics.round_finished(RECORD, SWAPPED)
    found = {sample.name for family in registry.collect() for sample in family.samples}
    assert {name for name in found if not name.endswith("_created")} == exported_names()


def test_the_dashboard_queries_exactly_what_is_exported() -> None:
    dashboard = json.loads((ROOT / "docs/grafana/eplb_affinity.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queried = set(re.findall(r"eplb_affinity_\w+", " ".join(queries)))
    assert queried <= exported_names()
    base = {metric.exported: metric for metric in METRICS}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in queried} == set(base)
    for query in queries:  # labels that are grouped by, or shown, exist
        for label in re.findall(r"by \(([\w, ]+)\)", query):
            names = {metric for name, metric in base.items() if name in query}
            assert {part.strip() for part in label.split(",")} - {"le"} <= {x for m in names for x in m.labels}
    # Panels lie side by side, none over another.
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_the_documentation_explains_every_metric_and_log_key() -> None:
    text = (ROOT / "docs/observability.md").read_text()
    documented = set(re.findall(r"`(eplb_affinity_\w+)", text))
    assert documented == {metric.exported for metric in METRICS}
    figures = set(MapFigures.__dataclass_fields__)
    for key in RoundRecord(
        "failed", "a", 1, moved_bytes=1, commit_ms=(1.0,), passes=1, reason="r", phase_seconds={"plan": 1.0}
    ).to_json() | {"regret": 0, "regret_by_layer": {}, "returned_layers": []}:
        assert re.search(rf"^\| [^|]*`{key}`", text, re.MULTILINE), key
    assert all(f"`{name}" in text for name in figures)
