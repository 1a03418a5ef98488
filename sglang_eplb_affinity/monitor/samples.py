"""Samples and histograms of a server's /metrics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from sglang_eplb_affinity.domain.errors import InputError


@dataclass(frozen=True)
class Histogram:
    """``bounds``: upper bounds, ascending, the last one infinite; ``counts``: observations up to each."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    sum: float

    @property
    def count(self) -> float:
        return self.counts[-1] if self.counts else 0.0

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None

    def quantile(self, q: float) -> float | None:
        """Interpolated within a bucket as Prometheus' histogram_quantile does; beyond the last finite bound that bound.

        None without observations.
        """
        if not self.count:
            return None
        rank = q * self.count
        at = next(i for i, count in enumerate(self.counts) if count >= rank)
        if math.isinf(self.bounds[at]):
            return self.bounds[at - 1] if at else None
        low, below = (self.bounds[at - 1], self.counts[at - 1]) if at else (0.0, 0.0)
        return low + (self.bounds[at] - low) * (rank - below) / (self.counts[at] - below)

    def since(self, earlier: Histogram) -> Histogram:
        """What was observed after ``earlier``; all of it when the server was started anew in between."""
        if self.bounds != earlier.bounds or self.count < earlier.count:
            return self
        counts = tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return Histogram(self.bounds, counts, self.sum - earlier.sum)


@dataclass(frozen=True)
class Samples:
    """By name: labels and value of each sample."""

    by_name: Mapping[str, list[tuple[Mapping[str, str], float]]]

    @staticmethod
    def parse(text: str, source: str) -> Samples:
        """``source``: names the text in the error. Raises InputError on what is not Prometheus' text format."""
        from prometheus_client.parser import text_string_to_metric_families

        found: dict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if not math.isnan(sample.value):  # no value yet
                        found[sample.name].append((sample.labels, float(sample.value)))
        except (ValueError, IndexError):
            raise InputError(f"{source}: is not Prometheus' text format, so no /metrics of a server") from None
        return Samples(found)

    def of(self, name: str, **labels: str) -> list[tuple[Mapping[str, str], float]]:
        """Samples of ``name`` that have these labels."""
        return [(have, value) for have, value in self.by_name.get(name, []) if labels.items() <= have.items()]

    def value(self, name: str, **labels: str) -> float | None:
        """Sum over the samples with these labels; None without any."""
        values = [value for _, value in self.of(name, **labels)]
        return sum(values) if values else None

    def histogram(self, name: str) -> Histogram | None:
        """All label sets of ``name`` added up; None when it is not exported."""
        counts: dict[float, float] = defaultdict(float)
        for labels, value in self.of(f"{name}_bucket"):
            counts[float(labels["le"])] += value
        if not counts:
            return None
        bounds = tuple(sorted(counts))
        return Histogram(bounds, tuple(counts[bound] for bound in bounds), self.value(f"{name}_sum") or 0.0)
