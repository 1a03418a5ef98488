"""Server flags: defaults that follow from ``--eplb-algorithm affinity``, and errors at start-up instead of later."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.sglang_hooks import async_arguments
from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape
from sglang_eplb_affinity.sglang_hooks.redundancy_advice import advice
from sglang_eplb_affinity.sglang_hooks.refusals import check_elastic, check_moving, check_placed
from sglang_eplb_affinity.sglang_hooks.server_arguments import (
    ADDED,
    ALGORITHM,
    DEFAULT_MIN_GAIN,
    INITIAL_MAP,
    ServerArguments,
)
from sglang_eplb_affinity.sglang_hooks.topk_flags import (
    check_own_rules,
    check_phase,
    check_schedule,
    check_top_k,
    is_ours,
    records_affinity,
    replaces_counts,
    rule_text,
    set_default_rule,
)

logger = logging.getLogger(__name__)


def known_algorithms() -> list[str]:
    from sglang.srt.eplb.eplb_algorithms import EplbAlgorithm

    return ["auto", *(member.name for member in EplbAlgorithm)]


def resolve(args: ServerArguments) -> None:
    missing = [name for name in ADDED if not hasattr(args, name)]
    if missing:
        raise InputError(
            f"SGLang has another version of the patch series than this sglang_eplb_affinity, without "
            f"--{missing[0].replace('_', '-')}; run `make apply` in its checkout"
        )
    name = args.eplb_algorithm
    if name not in known_algorithms():
        raise InputError(f"--eplb-algorithm {name}: unknown; known are {', '.join(known_algorithms())}")
    if name == ALGORITHM and not args.enable_eplb:
        args.enable_eplb = True
        logger.info("--eplb-algorithm affinity turns on --enable-eplb")
    if args.ep_dispatch_algorithm is None:
        set_default_rule(args)
    if args.expert_affinity_sample_tokens < 1:
        raise InputError(f"--expert-affinity-sample-tokens {args.expert_affinity_sample_tokens}: must be at least 1")
    for flag, share in (
        ("--eplb-affinity-max-load-increase", args.eplb_affinity_max_load_increase),
        ("--eplb-affinity-p95-allowance", args.eplb_affinity_p95_allowance),
    ):
        if share is not None and not 0 <= share < math.inf:
            raise InputError(f"{flag} {share}: must be 0 or more, and finite")
    if args.eplb_affinity_max_moves is not None and args.eplb_affinity_max_moves < 1:
        raise InputError(f"--eplb-affinity-max-moves {args.eplb_affinity_max_moves}: must be at least 1")
    _check_min_gain(args)
    check_schedule(args)
    if args.expert_load_log_passes < 0:
        raise InputError(f"--expert-load-log-passes {args.expert_load_log_passes}: must be 0 (off) or more")
    if args.expert_load_log_passes or args.eplb_record_map is not None:
        args.enable_expert_affinity_recorder = True
    async_arguments.resolve(args)
    if args.enable_expert_affinity_recorder and args.expert_distribution_recorder_mode is None:
        args.expert_distribution_recorder_mode = "stat"


def check(args: ServerArguments) -> None:
    """Once parallel sizes are resolved."""
    ours, forced, loads = is_ours(args), args.ep_forced_routing, args.init_expert_location != "trivial"
    check_own_rules(args)
    check_phase(args)
    if args.eplb_affinity_survive != "none" and not ours:
        raise InputError(f"--eplb-affinity-survive {args.eplb_affinity_survive}: needs --eplb-algorithm affinity")
    if args.eplb_affinity_p95_allowance is not None and not ours:
        raise InputError(
            f"--eplb-affinity-p95-allowance {args.eplb_affinity_p95_allowance}: needs --eplb-algorithm affinity"
        )
    if replaces_counts(args):  # nothing is put into SGLang's buffer of counts
        args.expert_distribution_recorder_buffer_size = 1
    if not ours and not records_affinity(args) and not forced and not loads:
        return
    if args.eplb_record_map is not None:
        _check_record_map(args)
    flag = _flag_in_use(args)
    shape = MoeShape.of(args.get_model_config().hf_text_config)
    if shape is None:
        raise InputError(f"{flag}: {args.model_path} has no routed experts; leave the flag out")
    check_top_k(flag, args)
    mode = args.expert_distribution_recorder_mode
    if (ours or records_affinity(args) or forced) and mode not in (None, "stat"):
        raise InputError(f"--expert-distribution-recorder-mode {mode}: {flag} needs mode stat; leave the flag out")
    if (ours or loads) and args.ep_size < 2:
        raise InputError(
            f"{'--eplb-algorithm affinity' if ours else INITIAL_MAP}: needs expert parallelism, but the EP size is "
            f"{args.ep_size}; give --ep-size of 2 or more (with --tp-size at least as large)"
        )
    async_arguments.check(args)
    if args.enable_eplb or loads:
        check_placed(args, "EPLB" if args.enable_eplb else INITIAL_MAP)
        if shape.zero_experts:
            raise InputError(
                f"{args.model_path}: its router also chooses {shape.zero_experts} zero experts, which no map has; "
                "leave out EPLB and --init-expert-location"
            )
    if ours or args.eplb_async:
        check_moving(args, "--eplb-async" if args.eplb_async else flag)
    if ours:
        check_elastic(args)
    if loads or args.enable_eplb:
        _check_slots(args, shape.num_experts)
    nodes = args.eplb_affinity_nodes
    if (ours or loads) and nodes is not None and (nodes < 1 or args.ep_size % nodes):
        raise InputError(f"--eplb-affinity-nodes {nodes}: must divide the EP size {args.ep_size}")
    _check_survive(args, nodes or args.nnodes)
    _check_files(args)
    if ours:
        logger.info(
            "[eplb-affinity] EPLB on: rebalance every %d passes, dispatch %s, %d redundant experts, %d nodes, "
            "load at most %+.1f %% of EPLB's, %d tokens sampled per layer",
            args.eplb_rebalance_num_iterations,
            rule_text(args, shape),
            args.ep_num_redundant_experts,
            nodes or args.nnodes,
            100 * args.eplb_affinity_max_load_increase,
            args.expert_affinity_sample_tokens,
        )
        told = advice(args, shape, args.get_model_config().hf_text_config)
        if told is not None:
            logger.info("[eplb-affinity] %s", told)


def _flag_in_use(args: ServerArguments) -> str:
    if is_ours(args):
        return "--eplb-algorithm affinity"
    if args.ep_forced_routing:
        return f"--ep-forced-routing {args.ep_forced_routing}"
    return "--enable-expert-affinity-recorder" if records_affinity(args) else INITIAL_MAP


def _check_slots(args: ServerArguments, num_experts: int) -> None:
    slots, ranks = num_experts + args.ep_num_redundant_experts, args.ep_size
    if slots % ranks:
        low = max(slots // ranks * ranks - num_experts, -num_experts % ranks)
        raise InputError(
            f"--ep-num-redundant-experts {args.ep_num_redundant_experts}: with the model's {num_experts} "
            f"experts this makes {slots} slots, which do not divide over EP size {ranks}; "
            f"use {low} or {low + ranks}"
        )
    most = num_experts * (ranks - 1)
    if is_ours(args) and args.ep_num_redundant_experts > most:
        raise InputError(
            f"--ep-num-redundant-experts {args.ep_num_redundant_experts}: {most} already put each of the model's "
            f"{num_experts} experts on each of {ranks} ranks; use at most {most}"
        )


def _check_survive(args: ServerArguments, nodes: int) -> None:
    wanted = args.eplb_affinity_survive
    if wanted == "none":
        return
    flag = f"--eplb-affinity-survive {wanted}"
    if args.eplb_affinity_incremental or args.eplb_affinity_max_moves is not None:
        raise InputError(
            f"{flag}: plans that keep to the map in force (--eplb-affinity-incremental, --eplb-affinity-max-moves) "
            "may not make the replicas that are missing; leave one of the flags out"
        )
    if not args.ep_num_redundant_experts:
        raise InputError(
            f"{flag}: no expert is on two ranks without redundant experts; give --ep-num-redundant-experts"
        )
    if wanted == "node" and nodes < 2:
        raise InputError(f"{flag}: needs two nodes or more, but --nnodes (or --eplb-affinity-nodes) is {nodes}")


def _check_files(args: ServerArguments) -> None:
    """A trace to force, and a map to load, of which the host of rank 0 reads the latter for all."""
    loads = args.init_expert_location != "trivial" and args.node_rank == 0
    if not loads and not args.ep_forced_routing:
        return
    # Not at the top: they need numba, which servers that do not use this package's flags need not load.
    from sglang_eplb_affinity.sglang_hooks import forcing
    from sglang_eplb_affinity.sglang_hooks.initial_map import placement_of, read_initial_map, warn_of_rule
    from sglang_eplb_affinity.sglang_hooks.settings import Settings

    settings = Settings.of(args)
    if args.ep_forced_routing:
        forcing.make(settings, "cpu", 0)
    if loads:
        warn_of_rule(read_initial_map(settings.initial_map, placement_of(settings)), settings)


def _check_min_gain(args: ServerArguments) -> None:
    gain = args.eplb_min_gain
    if not 0 <= gain < 1:
        raise InputError(f"--eplb-min-gain {gain}: must be a fraction, 0 to below 1")
    if gain != DEFAULT_MIN_GAIN and not args.eplb_async and args.eplb_algorithm != ALGORITHM:
        raise InputError(f"--eplb-min-gain {gain}: needs --eplb-async or --eplb-algorithm affinity")


def _check_record_map(args: ServerArguments) -> None:
    flag = f"--eplb-record-map {args.eplb_record_map}"
    path = Path(args.eplb_record_map or "")
    if path.suffix != ".json":
        raise InputError(f"{flag}: must end in .json, as --init-expert-location wants it")
    if not args.enable_eplb:
        raise InputError(f"{flag}: there are no rebalances to record without --enable-eplb")
    if args.node_rank == 0 and not path.parent.is_dir():
        raise InputError(f"{flag}: the folder {path.parent} does not exist")
    if args.dp_size > 1 and not args.enable_dp_attention:
        raise InputError(
            f"{flag}: with --dp-size {args.dp_size} each replica has a map of its own; "
            "record with one replica, or use --enable-dp-attention"
        )
