"""What follows from the server's arguments, each rule once; the hooks know nothing else of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from sglang_eplb_affinity.device.recorder import PHASES
from sglang_eplb_affinity.dispatch.default_rule import DispatchMode
from sglang_eplb_affinity.dispatch.rules import DISPATCH_RULES, LARGE_PASS_RULE, DispatchRule
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner.config import MOST_SEED, Objective, PlannerConfig
from sglang_eplb_affinity.rebalance.config import AsyncConfig
from sglang_eplb_affinity.sglang_hooks import async_arguments, topk_flags
from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape
from sglang_eplb_affinity.sglang_hooks.server_arguments import ALGORITHM, ServerArguments


@dataclass(frozen=True)
class RecordingSettings:
    """Passes and tokens of the affinity recorder. ``max_pass_tokens``: that a pass of one data-parallel group can have.

    ``phase``: of the passes that are recorded, and so planned for. ``interval``: passes from one rebalance to the next.
    ``log_passes``: of the load log, 0: off.
    """

    phase: Literal["prefill", "decode", "both"] = "both"
    every: int = 1
    last_passes: int | None = None
    interval: int = 1000
    sample_tokens: int = 8192
    max_pass_tokens: int = 8192
    seed: int = 0
    log_passes: int = 0
    speculative: bool = False

    def records_phase(self, phase: int) -> bool:
        """``phase``: index into PHASES of the recorder."""
        return self.phase in ("both", PHASES[phase])

    @staticmethod
    def of(args: ServerArguments) -> RecordingSettings:
        return RecordingSettings(
            phase=topk_flags.recorded_phase(args),
            every=args.expert_affinity_record_every,
            last_passes=args.expert_affinity_record_last_passes,
            interval=args.eplb_rebalance_num_iterations,
            sample_tokens=args.expert_affinity_sample_tokens,
            max_pass_tokens=_most_tokens_of_a_pass(args),
            seed=(args.random_seed or 0) & MOST_SEED,
            log_passes=args.expert_load_log_passes,
            speculative=args.speculative_algorithm is not None,
        )


@dataclass(frozen=True)
class ReportSettings:
    """Where rounds are told. ``labels`` None: no metrics. ``own_map``: each data-parallel replica has a map."""

    labels: dict[str, str] | None = None
    own_map: bool = False
    record_map: str | None = None

    @staticmethod
    def of(args: ServerArguments) -> ReportSettings:
        labels = {"model_name": args.served_model_name or args.model_path}
        labels |= {str(name): str(value) for name, value in (args.extra_metric_labels or {}).items()}
        own_map = args.dp_size > 1 and not args.enable_dp_attention
        return ReportSettings(labels if args.enable_metrics else None, own_map, args.eplb_record_map)


@dataclass(frozen=True)
class Settings:
    """Of one server, once its arguments are resolved.

    ``algorithm``: of --eplb-algorithm. ``table_rule``: how replicas are chosen. ``served_rule``: the same by
    SGLang's name. ``primary_rows``: of a rank in a pass that is small under ``primary``. ``redundant``: experts.
    ``own_tokens``: an all-to-all backend is in force, so that each rank routes tokens of its own. ``records``: the
    affinity recorder is on. ``chooses_replicas``: our rules make logical ids physical. ``replaces_counts``: our
    recorder's counts stand in for SGLang's. ``initial_map``: of --init-expert-location. ``shape`` None: no routed
    experts. ``planner``: once a planned map is in force. ``eplb_nodes``: nodes of SGLang's own placements.
    ``asynchronous`` None: rounds stop serving.
    """

    algorithm: str
    table_rule: DispatchRule
    topology: Topology
    planner: PlannerConfig
    eplb: bool = True
    served_rule: str | None = None
    redundant: int = 0
    primary_rows: int = 0
    own_tokens: bool = False
    dispatch_mode: DispatchMode | None = None
    records: bool = True
    chooses_replicas: bool = True
    replaces_counts: bool = True
    forced_routing: str | None = None
    initial_map: str = "trivial"
    model_path: str = ""
    architecture: str = "unknown"
    shape: MoeShape | None = None
    eplb_nodes: int = 1
    device: str = "cpu"
    asynchronous: AsyncConfig | None = None
    recording: RecordingSettings = RecordingSettings()
    reports: ReportSettings = ReportSettings()

    @staticmethod
    def of(args: ServerArguments) -> Settings:
        """``args`` must be resolved. Raises InputError for a flag that is out of range."""
        model = args.get_model_config()
        rules: dict[str | None, DispatchRule] = {rule: rule for rule in DISPATCH_RULES}
        rule = rules.get(args.ep_dispatch_algorithm, "dynamic")
        shape = MoeShape.of(model.hf_text_config)
        small = topk_flags.primary_rows(args, shape)
        return Settings(
            algorithm=args.eplb_algorithm,
            table_rule=rule,
            topology=Topology(args.ep_size, topk_flags.planned_nodes(args)),
            planner=_planner_config(args, _planned_for(rule, args, small), num_groups_of(model)),
            eplb=args.enable_eplb,
            served_rule=args.ep_dispatch_algorithm,
            redundant=args.ep_num_redundant_experts,
            primary_rows=small,
            own_tokens=args.moe_a2a_backend != "none",
            dispatch_mode=topk_flags.dispatch_mode(args),
            records=topk_flags.records_affinity(args),
            chooses_replicas=topk_flags.chooses_replicas(args),
            replaces_counts=topk_flags.replaces_counts(args),
            forced_routing=args.ep_forced_routing,
            initial_map=args.init_expert_location,
            model_path=args.model_path,
            architecture=(getattr(model.hf_config, "architectures", None) or ["unknown"])[0],
            shape=shape,
            eplb_nodes=args.nnodes,
            device=args.device,
            asynchronous=async_arguments.config_of(args) if args.eplb_async else None,
            recording=RecordingSettings.of(args),
            reports=ReportSettings.of(args),
        )

    @property
    def rule(self) -> DispatchRule:
        """As the planner knows it."""
        return self.planner.dispatch

    @property
    def ours(self) -> bool:
        """Our algorithm plans."""
        return self.eplb and self.algorithm == ALGORITHM

    @property
    def loads_map(self) -> bool:
        return self.initial_map != "trivial"

    @property
    def planner_from_scratch(self) -> PlannerConfig:
        """While no planned map is in force."""
        return replace(self.planner, incremental=False, warm_start=False, max_moves=None)


def _most_tokens_of_a_pass(args: ServerArguments) -> int:
    """Of prefill, which without chunks may be one request as long as the context, and of the decodes run with it."""
    prefill = args.chunked_prefill_size or 0
    if prefill <= 0:
        prefill = max(args.max_prefill_tokens, int(args.get_model_config().context_len))
    return prefill + 8192


def _planned_for(rule: DispatchRule, args: ServerArguments, primary_rows: int) -> DispatchRule:
    """``primary`` without small passes decodes by ``static``: over several nodes a map that keeps copies on their node
    gains most there, and prefill gains by its choice on such a map too (docs/design.md). Within one only the choice of
    prefill is worth a map, where there is any."""
    if rule != "primary" or primary_rows:
        return rule
    decode_decides = topk_flags.planned_nodes(args) > 1 or topk_flags.dispatch_mode(args) == "low_latency"
    return "static" if decode_decides else LARGE_PASS_RULE


def num_groups_of(model_config: Any) -> int | None:
    """Expert groups of group-limited routing (``n_group`` of DeepSeek-V3's config), or None."""
    return getattr(getattr(model_config, "hf_config", None), "n_group", None) or None


def _planner_config(args: ServerArguments, rule: DispatchRule, num_groups: int | None) -> PlannerConfig:
    """DeepEP's auto mode sends prefill tokens once per destination and decode tokens once per expert, so there the
    objective weighs the two by the window's share of prefill. DeepEP V2 sends both once per destination."""
    objectives: dict[str | None, Objective] = {"auto": "mixed", "low_latency": "low_latency", "v2": "v2"}
    return PlannerConfig(
        objective=objectives.get(topk_flags.dispatch_mode(args), "normal"),
        max_load_increase=args.eplb_affinity_max_load_increase,
        p95_allowance=args.eplb_affinity_p95_allowance,
        effort="fast",
        dispatch=rule,
        incremental=args.eplb_affinity_incremental,
        warm_start=True,
        max_moves=args.eplb_affinity_max_moves,
        minimum_gain=args.eplb_min_gain or None,
        num_groups=num_groups,
        survive=args.eplb_affinity_survive,
        further_slots=args.eplb_affinity_further_slots if rule == "primary" else 0,
    )
