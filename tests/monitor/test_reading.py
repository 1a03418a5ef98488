"""What is read is what the package exports; rounds and latencies over time; limits."""

import pytest

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.monitor.history import PlacementHistory, ServerHistory
from sglang_eplb_affinity.monitor.limits import WATCHED, Limit, check_all
from sglang_eplb_affinity.monitor.reading import FIGURES, JUDGED, JUDGED_FIGURES, PREFIX, Reading
from sglang_eplb_affinity.monitor.samples import Samples
from sglang_eplb_affinity.rebalance.metrics import METRICS, RESULTS
from sglang_eplb_affinity.rebalance.metrics import PREFIX as EXPORTED_PREFIX
from tests.monitor.conftest import Exporter


def test_the_names_read_are_exported() -> None:
    names = {metric.name for metric in METRICS}
    assert PREFIX == EXPORTED_PREFIX and set(FIGURES) <= names
    assert {f"{of}_{figure}" for of in JUDGED for figure in JUDGED_FIGURES} <= names
    assert {"regret", "returned_layers", "moved_bytes", "last_round_timestamp_seconds"} <= names


def test_before_and_after_a_round(exporter: Exporter) -> None:
    (placement,) = exporter.reading().placements
    assert placement.figures == {} and placement.in_force("balancedness") is None and placement.record is None
    assert placement.rounds == dict.fromkeys(RESULTS, 0) and placement.last_round is None
    record = exporter.end_round("applied")
    reading = exporter.reading(record=record)
    (placement,) = reading.placements
    assert placement.figures["balancedness"] == {"contiguous": 0.5, "before": 0.6, "after": 0.9}
    assert placement.in_force("gpu_fanout") == 1.5 and placement.rounds["applied"] == 1
    assert (placement.moved_experts, placement.moved_bytes) == (2, 2048)
    assert reading.model == "models/tiny" and reading.ttft_p99 is None and reading.running == 3
    line = reading.to_json()
    assert line["placements"][0]["record"]["result"] == "applied" and line["tpot_mean_seconds"] is None


def test_a_map_for_each_data_parallel_rank() -> None:
    first, second = Exporter("0"), Exporter("1")
    first.end_round("applied", 0.9)
    record = second.end_round("applied", 0.7)
    reading = Reading.of("u", 0, Samples.parse(_placement_of(first) + _placement_of(second), "u"))
    reading = reading.with_records([None, {"eplb_affinity": record.to_json()}])
    assert [p.dp_rank for p in reading.placements] == ["0", "1"]
    assert [p.in_force("balancedness") for p in reading.placements] == [0.9, 0.7]
    assert reading.placements[0].record is None and reading.placements[1].record is not None
    (alert,), _ = check_all([Limit.parse("balancedness=0.8")], [reading])
    assert str(alert) == "u dp_rank 1: balancedness 0.7 is below 0.8"


def _placement_of(exporter: Exporter) -> str:
    return "".join(line for line in exporter.text().splitlines(True) if line.startswith("eplb_affinity"))


def test_rounds_that_end_between_readings(exporter: Exporter) -> None:
    history = PlacementHistory()

    def read(record=None) -> list[dict]:
        before = len(history.rounds)
        history.add(exporter.reading(record=record).placements[0])
        return [{k: v for k, v in found.items() if k in ("result", "moved_experts", "reason", "round")}
                for found in list(history.rounds)[before:]]  # fmt: skip

    last = exporter.end_round("applied", 0.8)
    assert read(last) == [{"result": "applied", "moved_experts": 2, "round": 1}]  # ended before the monitor began
    assert read(last) == []
    last = exporter.end_round("failed", moved=0)
    assert read(last) == [{"result": "failed", "moved_experts": 0, "round": 2, "reason": "rank 1 failed"}]
    exporter.end_round("applied", 0.9)
    last = exporter.end_round("applied", 0.95)
    assert read(last) == [{"result": "applied"}, {"result": "applied", "moved_experts": 2, "round": 4}]
    exporter.end_round("applied", moved=3)
    assert read() == [{"result": "applied", "moved_experts": 3}]  # from a server that gives no records
    assert list(history.values["balancedness"]) == [0.8, 0.8, 0.95, 0.9]


def test_latencies_are_of_the_last_minute(exporter: Exporter) -> None:
    server = ServerHistory("http://a:1")
    exporter.ttft.observe(5)
    server.add(exporter.reading(0))
    assert server.latest is not None and server.latest.ttft_p99 == 1  # beyond the last bound
    exporter.ttft.observe(0.05)
    server.add(exporter.reading(30))
    assert server.latest.ttft_p99 == pytest.approx(0.099)
    for time in (59, 90, 120):
        server.add(exporter.reading(time))
    assert server.latest.ttft_p99 is None  # nothing ended since
    server.add(InputError("away"))
    assert server.error == "away" and server.latest is not None
    server.add(exporter.reading(121))
    assert server.error is None


@pytest.mark.parametrize(
    ("limit", "alerts"),
    [
        ("balancedness=0.9", 0), ("balancedness=0.91", 1), ("gpu_fanout=1.5", 0), ("node_fanout=1.2", 1),
        ("failed_rounds=0", 0), ("ttft_p99=0.05", 1), ("tpot_mean=0.5", 0),
    ],
)  # fmt: skip
def test_limits(exporter: Exporter, limit: str, alerts: int) -> None:
    exporter.end_round("applied")
    exporter.ttft.observe(0.5)
    exporter.tpot.observe(0.05)
    found, missing = check_all([Limit.parse(limit)], [exporter.reading()])
    assert len(found) == alerts and missing == []


def test_what_has_no_value_is_no_alert_but_is_said(exporter: Exporter) -> None:
    assert set(WATCHED) >= {"balancedness", "delivered_load", "regret"}
    found, missing = check_all([Limit.parse("balancedness=0.8")], [exporter.reading()])
    assert found == [] and missing == ["http://a:1: balancedness has no value yet"]


@pytest.mark.parametrize("text", ["balance=1", "balancedness", "balancedness=", "balancedness=nan", "=1"])
def test_limits_that_say_nothing(text: str) -> None:
    with pytest.raises(InputError, match=f"^--alert {text}: "):
        Limit.parse(text)
