"""SGLang's recorder and EPLB manager with ours in them, as subclasses: SGLang constructs what these functions give."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.sglang_hooks import process
from sglang_eplb_affinity.sglang_hooks.adapter import adapter
from sglang_eplb_affinity.sglang_hooks.topk_flags import records_affinity, replaces_counts

if TYPE_CHECKING:
    from sglang_eplb_affinity.rebalance.synchronous import SynchronousRound, SynchronousRounds
    from sglang_eplb_affinity.sglang_hooks.recording import ServerRecorder


def recorder_class(base: Any) -> type:
    """A subclass of SGLang's ``_ExpertDistributionRecorderReal`` that records affinity as well."""
    module: Any = sys.modules[base.__module__]

    class Recorder(base):
        def __init__(self, *args: Any) -> None:
            arguments = adapter().arguments()
            # 8 whatever the model.
            module._DetailSinglePassGatherer._TOP_K_NUM = _top_k(arguments)
            self._affinity: Any = None
            super().__init__(*args)
            if records_affinity(arguments):
                self._affinity = _make_recorder(args[-2], self)
            self._replaces_counts = replaces_counts(arguments)
            self._device = arguments.device
            self._recorder_rank = args[-1]
            self.last_window: Any = None
            if self._replaces_counts:
                self._single_pass_gatherers: dict[str, Any] = {}
            if not self._recording and self._affinity is not None and self._affinity.records_from_start:
                self.start_record()

        def records_affinity_now(self) -> bool:
            return not self._disable_all and (self._recording or _is_capturing())

        def _on_forward_pass_start(self, forward_batch: Any) -> None:
            super()._on_forward_pass_start(forward_batch)
            if self._recording and self._affinity is not None:
                self._affinity.on_forward_pass_start(forward_batch)

        def _on_forward_pass_end(self, forward_pass_id: int, outputs: dict[str, Any]) -> None:
            super()._on_forward_pass_end(forward_pass_id, outputs)
            if self._recording and self._affinity is not None:
                self._affinity.on_forward_pass_end()

        def _on_hook(self, hook_name: str, **kwargs: Any) -> None:
            if self._single_pass_gatherers:
                super()._on_hook(hook_name, **kwargs)

        def _reset(self) -> None:
            super()._reset()
            if self._affinity is not None:
                self._affinity.reset()

        def start_record(self) -> None:
            if not self._keeps_recording("start"):
                super().start_record()

        def stop_record(self) -> None:
            if not self._keeps_recording("stop"):
                super().stop_record()

        def dump_record(self, output_mode: str = "file") -> Any:
            """``object`` is EPLB's; its window stays in ``last_window`` for the round that follows."""
            window = None if self._affinity is None else self._affinity.window()
            self.last_window = window
            if window is None and output_mode == "object":
                output = self._counts_of_records() if hasattr(self._accumulator, "_records") else None
                output = output or self._accumulator.dump(output_mode=output_mode)
                self._reset()
                return output
            if window is None:
                return super().dump_record(output_mode)
            output = self._counts(window)
            output["affinity"] = window.for_output(output_mode)
            if output_mode == "file" and self._recorder_rank == 0:
                module._dump_to_file(f"expert_distribution_recorder_{time.time()}.pt", output)
            if output_mode == "object" or not self._keeps_recording("dump"):
                self._reset()
            return output if output_mode == "object" else None

        def _keeps_recording(self, action: str) -> bool:
            """EPLB plans on this record: it goes on, whatever is asked of it over HTTP."""
            keeps = bool(self._recording and self._affinity is not None and self._affinity.serves_eplb)
            if keeps:
                module.logger.info(f"[eplb-affinity] {action}: EPLB plans on this record, so it goes on")
            return keeps

        def _counts(self, window: Any) -> dict[str, Any]:
            if self._replaces_counts:
                return {
                    "rank": self._recorder_rank,
                    "logical_count": window.logical_count(self._device),
                    "average_utilization_rate_over_window": None,
                }
            output: dict[str, Any] = self._accumulator.dump(output_mode="object")
            return output

        def _counts_of_records(self) -> dict[str, Any]:
            """What EPLB needs of the modes per_token and per_pass, which dump to a file only."""
            metadata = self._expert_location_metadata
            shape = (1, metadata.num_layers, metadata.num_physical_experts)
            physical = torch.zeros(shape, dtype=torch.int32)
            for record in self._accumulator._records:
                physical += record["global_physical_count"].to(torch.int32)
            logical = module._convert_global_physical_count_to_logical_count(
                physical.to(self._device),
                num_layers=metadata.num_layers,
                num_logical_experts=metadata.num_logical_experts,
                physical_to_logical_map=metadata.physical_to_logical_map,
            )
            torch.distributed.all_reduce(logical, op=torch.distributed.ReduceOp.SUM)
            return {
                "rank": self._recorder_rank,
                "logical_count": logical,
                "average_utilization_rate_over_window": None,
            }

    return Recorder


def manager_class(base: Any) -> type:
    """A subclass of SGLang's ``EPLBManager`` whose rounds plan with affinity, or are the asynchronous rebalancer's."""

    module: Any = sys.modules[base.__module__]

    class MapStays(Exception):
        """Nothing to move in this round."""

    class Manager(base):
        affinity_rebalancer: Any = None  # with --eplb-async
        _affinity_rounds: SynchronousRounds | None = None
        _affinity_round: SynchronousRound | None = None
        _planned: Any = None
        _living: Any = None  # LivingRanks while elastic EP's ranks are gone

        def on_forward_pass_end(self) -> None:
            if self.affinity_rebalancer is not None:
                self.affinity_rebalancer.on_forward_pass_end()
            else:
                super().on_forward_pass_end()

        def rebalance(self) -> Iterator[None]:
            self._affinity_round = None
            try:
                yield from super().rebalance()
            except MapStays:
                return
            if self._affinity_round is not None:
                from sglang_eplb_affinity.sglang_hooks.expert_weights import expert_bytes
                from sglang_eplb_affinity.sglang_hooks.location import map_of

                weights = self._get_model().routed_experts_weights_of_layer
                planned = map_of(self._planned)
                planned = planned if self._living is None else self._living.of_map(planned)
                self._affinity_round.finish(planned, expert_bytes(weights))

        def _compute_expert_location_metadata(self, logical_count: Any, **kwargs: Any) -> Any:
            from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
            from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

            recorded = get_global_expert_distribution_recorder().last_window
            settings = process.settings()
            if recorded is None:
                return self._sglangs_plan(logical_count, **kwargs)
            from sglang_eplb_affinity.sglang_hooks import gone_ranks, rounds
            from sglang_eplb_affinity.sglang_hooks.location import metadata_of

            in_force = get_global_expert_location_metadata()
            living = self._living = gone_ranks.living_ranks(settings.topology)
            try:
                current = gone_ranks.map_in_force(in_force, living, recorded.window.counts)
            except InputError as error:
                if not settings.ours:
                    return self._sglangs_plan(logical_count, **kwargs)
                if living is not None and torch.distributed.get_rank() == living.ranks[0]:
                    module.logger.error("[eplb-affinity] %s; the map in force stays", error)
                raise MapStays from None
            self._affinity_rounds = rounds.for_living(self._affinity_rounds, settings, living)
            self._affinity_round = self._affinity_rounds.begin(recorded.window, current.expert_map, current.may_stay)
            if not settings.ours:
                return self._sglangs_plan(logical_count, **kwargs)
            planned = self._affinity_round.plan()
            if planned is None:
                self._affinity_round = None
                raise MapStays
            gone_ranks.leaves_out(in_force, living)
            device = in_force.physical_to_logical_map.device
            self._planned = metadata_of(
                planned, settings.topology, settings.table_rule, device, living=living,
                further_slots=settings.planner.further_slots,
            )  # fmt: skip
            return self._planned

        def _sglangs_plan(self, logical_count: Any, **kwargs: Any) -> Any:
            self._planned = super()._compute_expert_location_metadata(logical_count, **kwargs)
            settings = process.settings()
            if settings.table_rule == "primary":
                from sglang_eplb_affinity.sglang_hooks.location import with_primaries

                with_primaries(self._planned, settings.topology, settings.planner.further_slots)
            return self._planned

    return Manager


def _make_recorder(expert_location_metadata: Any, owner: Any) -> ServerRecorder:
    """The affinity recorder of this rank, in the step at every layer too; ``owner`` is SGLang's recorder."""
    from sglang_eplb_affinity.sglang_hooks import rounds
    from sglang_eplb_affinity.sglang_hooks.recording import ServerRecorder
    from sglang_eplb_affinity.sglang_hooks.topk_step import TopkStep

    settings = process.settings()
    recorder = ServerRecorder(settings, expert_location_metadata, owner)
    process.topk_step = TopkStep(settings, expert_location_metadata, recorder)
    rounds.warm_up_planner(settings)
    return recorder


def _top_k(arguments: Any) -> int:
    from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape

    shape = MoeShape.of(arguments.get_model_config().hf_text_config)
    return 8 if shape is None else shape.top_k


def _is_capturing() -> bool:
    function = getattr(torch.get_device_module(), "is_current_stream_capturing", None)  # torch.cpu has none
    return function is not None and bool(function())
