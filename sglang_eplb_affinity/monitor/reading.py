"""What one server said at one time: figures of its placement, and latencies of SGLang's own metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.monitor.samples import Histogram, Samples

PREFIX = "eplb_affinity_"
FIGURES = ("balancedness", "gpu_fanout", "node_fanout")
JUDGED = ("promised", "delivered", "previous_map", "best_map")
JUDGED_FIGURES = ("load", "gpu_fanout", "node_fanout", "cost")
TTFT = "sglang:time_to_first_token_seconds"
TPOT = "sglang:inter_token_latency_seconds"


@dataclass(frozen=True)
class Placement:
    """Of one expert map of the server; there is one for each ``dp_rank`` where replicas have maps of their own.

    ``figures``: by figure and map (contiguous, before, after); empty before the first round. ``judged``: by map (of
    JUDGED) and figure; empty until a window was recorded under a planned map. ``rounds`` by result. Times are Unix
    times. ``record``: the log line of the last round.
    """

    dp_rank: str | None
    figures: Mapping[str, Mapping[str, float]]
    judged: Mapping[str, Mapping[str, float]]
    regret: float | None
    returned_layers: int
    rounds: Mapping[str, int]
    moved_experts: int
    moved_bytes: int
    last_round: float | None
    last_commit: float | None
    record: Mapping[str, Any] | None = None

    def in_force(self, figure: str) -> float | None:
        """Of the map in force, on the last window."""
        return self.figures.get(figure, {}).get("after")

    @staticmethod
    def of(samples: Samples, dp_rank: str | None) -> Placement:
        labels = {} if dp_rank is None else {"dp_rank": dp_rank}

        def value(name: str) -> float | None:
            return samples.value(PREFIX + name, **labels)

        def by(label: str, name: str) -> dict[str, float]:
            return {have[label]: number for have, number in samples.of(PREFIX + name, **labels)}

        def judged(of: str) -> dict[str, float]:
            values = {figure: value(f"{of}_{figure}") for figure in JUDGED_FIGURES}
            return {figure: number for figure, number in values.items() if number is not None}

        return Placement(
            dp_rank,
            {figure: found for figure in FIGURES if (found := by("map", figure))},
            {of: found for of in JUDGED if (found := judged(of))},
            value("regret"),
            int(value("returned_layers_total") or 0),
            {result: int(count) for result, count in by("result", "rebalances_total").items()},
            int(value("moved_experts_total") or 0),
            int(value("moved_bytes_total") or 0),
            value("last_round_timestamp_seconds"),
            value("last_commit_timestamp_seconds"),
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "dp_rank": self.dp_rank,
            **{figure: dict(self.figures.get(figure, {})) for figure in FIGURES},
            **{of: dict(self.judged.get(of, {})) for of in JUDGED},
            "regret": self.regret,
            "returned_layers": self.returned_layers,
            "rounds": dict(self.rounds),
            "moved_experts": self.moved_experts,
            "moved_bytes": self.moved_bytes,
            "last_round": self.last_round,
            "last_commit": self.last_commit,
            "record": None if self.record is None else dict(self.record),
        }


@dataclass(frozen=True)
class Reading:
    """``time``: Unix. ``ttft``, ``tpot``: seconds, since the start of the server unless narrowed with ``since``."""

    url: str
    time: float
    model: str
    placements: tuple[Placement, ...]
    ttft: Histogram | None = None
    tpot: Histogram | None = None
    running: float | None = None
    queued: float | None = None

    @staticmethod
    def of(url: str, time: float, samples: Samples) -> Reading:
        """Raises InputError when the server exports no figures of placement."""
        rounds = samples.of(PREFIX + "rebalances_total")
        if not rounds:
            raise InputError(
                f"{url}: has metrics, but none of placement; start the server with --eplb-algorithm affinity, "
                "or with --enable-expert-affinity-recorder beside SGLang's algorithms"
            )
        ranks = sorted({labels.get("dp_rank") for labels, _ in rounds}, key=lambda rank: int(rank or 0))
        return Reading(
            url,
            time,
            rounds[0][0].get("model_name", ""),
            tuple(Placement.of(samples, rank) for rank in ranks),
            samples.histogram(TTFT),
            samples.histogram(TPOT),
            samples.value("sglang:num_running_reqs"),
            samples.value("sglang:num_queue_reqs"),
        )

    def with_records(self, states: Sequence[Any]) -> Reading:
        """``states``: ``internal_states`` of /server_info, one for each data-parallel rank."""
        found = [state.get("eplb_affinity") if isinstance(state, Mapping) else None for state in states]
        records = [record if isinstance(record, Mapping) else None for record in found]
        first = next((record for record in records if record), None)
        of_rank = {str(rank): record for rank, record in enumerate(records)}
        placements = (
            replace(placement, record=first if placement.dp_rank is None else of_rank.get(placement.dp_rank))
            for placement in self.placements
        )
        return replace(self, placements=tuple(placements))

    @property
    def ttft_p99(self) -> float | None:
        return self.ttft.quantile(0.99) if self.ttft else None

    @property
    def tpot_mean(self) -> float | None:
        return self.tpot.mean if self.tpot else None

    def to_json(self) -> dict[str, Any]:
        return {
            "url": self.url,
            "time": self.time,
            "model": self.model,
            "placements": [placement.to_json() for placement in self.placements],
            "ttft_p99_seconds": self.ttft_p99,
            "tpot_mean_seconds": self.tpot_mean,
            "running_requests": self.running,
            "queued_requests": self.queued,
        }
