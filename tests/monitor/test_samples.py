"""Histograms as Prometheus reads them, and texts that are none."""

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.monitor.samples import Samples


def exported(*groups: list[float]) -> Samples:
    """Each group of observations has a label of its own."""
    registry = CollectorRegistry()
    histogram = Histogram("latency", "seconds", ["stream"], registry=registry, buckets=(0.1, 0.2, 0.4, 1))
    for index, group in enumerate(groups):
        for value in group:
            histogram.labels(str(index)).observe(value)
    return Samples.parse(generate_latest(registry).decode(), "test")


def test_quantiles_are_interpolated_within_the_bucket_over_all_labels() -> None:
    found = exported([0.05, 0.15], [0.15, 0.3]).histogram("latency")
    assert found is not None and found.count == 4 and found.mean == pytest.approx(0.1625)
    # histogram_quantile: rank 2 of 4 is one of the two observations between 0.1 and 0.2, so half of the way.
    assert found.quantile(0.5) == pytest.approx(0.15)
    assert found.quantile(0.125) == pytest.approx(0.05)
    assert found.quantile(0.99) == pytest.approx(0.2 + 0.2 * 0.96)


def test_beyond_the_last_bound_and_without_observations() -> None:
    beyond = exported([5.0]).histogram("latency")
    assert beyond is not None and beyond.quantile(0.99) == 1
    nothing = exported().histogram("latency")
    assert nothing is None
    both = exported([0.3]).histogram("latency")
    assert both is not None and both.since(both).quantile(0.99) is None and both.since(both).mean is None


def test_what_was_observed_since_an_earlier_reading() -> None:
    earlier, later = exported([0.05]).histogram("latency"), exported([0.05, 0.3]).histogram("latency")
    assert earlier is not None and later is not None
    since = later.since(earlier)
    assert since.count == 1 and since.mean == pytest.approx(0.3) and 0.2 < (since.quantile(0.5) or 0) <= 0.4
    assert earlier.since(later) == earlier  # started anew in between


@pytest.mark.parametrize("text", ["<html><body>hello</body></html>", '{"detail": "x"} y z', "a b c d"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^there: is not Prometheus' text format"):
        Samples.parse(text, "there")
