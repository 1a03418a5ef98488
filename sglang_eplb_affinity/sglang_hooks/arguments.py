"""Server flags: defaults that follow from ``--eplb-algorithm affinity``, and errors at start-up instead of later."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.sglang_hooks import ALGORITHM, async_arguments
from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape
from sglang_eplb_affinity.sglang_hooks.refusals import check_moving, check_placed
from sglang_eplb_affinity.sglang_hooks.topk_flags import (
    check_cover,
    check_schedule,
    check_top_k,
    gains_by_cover,
    is_ours,
    records_affinity,
    replaces_counts,
)

logger = logging.getLogger(__name__)

INITIAL_MAP = "--init-expert-location"
DEFAULT_MIN_GAIN = 0.02  # of --eplb-min-gain, as the series has it
# What the patch series adds to SGLang's ServerArgs.
ADDED = (
    "enable_expert_affinity_recorder",
    "ep_forced_routing",
    "eplb_affinity_incremental",
    "eplb_affinity_max_load_increase",
    "eplb_affinity_max_moves",
    "eplb_affinity_nodes",
    "eplb_async",
    "eplb_async_layers_in_flight",
    "eplb_min_gain",
    "eplb_async_phase_limit",
    "eplb_async_run_once",
    "eplb_async_warm_up_passes",
    "eplb_record_map",
    "expert_affinity_record_every",
    "expert_affinity_record_last_passes",
    "expert_affinity_sample_tokens",
    "expert_load_log_passes",
)


def known_algorithms() -> list[str]:
    from sglang.srt.eplb.eplb_algorithms import EplbAlgorithm

    return ["auto", *(member.name for member in EplbAlgorithm)]


def resolve(server_args: Any) -> None:
    missing = [name for name in ADDED if not hasattr(server_args, name)]
    if missing:
        raise InputError(
            f"SGLang has another version of the patch series than this sglang_eplb_affinity, without "
            f"--{missing[0].replace('_', '-')}; run `make apply` in its checkout"
        )
    name = server_args.eplb_algorithm
    if name not in known_algorithms():
        raise InputError(f"--eplb-algorithm {name}: unknown; known are {', '.join(known_algorithms())}")
    if name == ALGORITHM and not server_args.enable_eplb:
        server_args.enable_eplb = True
        logger.info("--eplb-algorithm affinity turns on --enable-eplb")
    if server_args.ep_dispatch_algorithm is None and gains_by_cover(server_args):
        server_args.ep_dispatch_algorithm = "cover"
    if server_args.expert_affinity_sample_tokens < 1:
        raise InputError(
            f"--expert-affinity-sample-tokens {server_args.expert_affinity_sample_tokens}: must be at least 1"
        )
    if not server_args.eplb_affinity_max_load_increase >= 0:
        raise InputError(
            f"--eplb-affinity-max-load-increase {server_args.eplb_affinity_max_load_increase}: must be 0 or more"
        )
    if server_args.eplb_affinity_max_moves is not None and server_args.eplb_affinity_max_moves < 1:
        raise InputError(f"--eplb-affinity-max-moves {server_args.eplb_affinity_max_moves}: must be at least 1")
    _check_min_gain(server_args)
    check_schedule(server_args)
    if server_args.expert_load_log_passes < 0:
        raise InputError(f"--expert-load-log-passes {server_args.expert_load_log_passes}: must be 0 (off) or more")
    if server_args.expert_load_log_passes or server_args.eplb_record_map is not None:
        server_args.enable_expert_affinity_recorder = True
    async_arguments.resolve(server_args)
    if server_args.enable_expert_affinity_recorder and server_args.expert_distribution_recorder_mode is None:
        server_args.expert_distribution_recorder_mode = "stat"


def check(server_args: Any) -> None:
    view = server_args._resolved()
    ours = is_ours(server_args)
    forced = server_args.ep_forced_routing
    loads = server_args.init_expert_location != "trivial"
    check_cover(server_args)
    if replaces_counts(server_args):  # nothing is put into SGLang's buffer of counts
        server_args.expert_distribution_recorder_buffer_size = 1
    if not ours and not records_affinity(server_args) and not forced and not loads:
        return
    if server_args.eplb_record_map is not None:
        _check_record_map(server_args)
    shape = MoeShape.of(server_args.get_model_config().hf_text_config)
    flag = (
        "--eplb-algorithm affinity"
        if ours
        else f"--ep-forced-routing {forced}"
        if forced
        else "--enable-expert-affinity-recorder"
        if records_affinity(server_args)
        else INITIAL_MAP
    )
    if shape is None:
        raise InputError(f"{flag}: {server_args.model_path} has no routed experts; leave the flag out")
    check_top_k(flag, server_args)
    mode = server_args.expert_distribution_recorder_mode
    if (ours or records_affinity(server_args) or forced) and mode not in (None, "stat"):
        raise InputError(f"--expert-distribution-recorder-mode {mode}: {flag} needs mode stat; leave the flag out")
    if (ours or loads) and view.ep_size < 2:
        raise InputError(
            f"{'--eplb-algorithm affinity' if ours else INITIAL_MAP}: needs expert parallelism, but the EP size is "
            f"{view.ep_size}; give --ep-size of 2 or more (with --tp-size at least as large)"
        )
    async_arguments.check(server_args, view)
    if server_args.enable_eplb or loads:
        check_placed(server_args, "EPLB" if server_args.enable_eplb else INITIAL_MAP)
    if ours or server_args.eplb_async:
        check_moving(server_args, view, "--eplb-async" if server_args.eplb_async else flag)
    if forced:
        from sglang_eplb_affinity.sglang_hooks.forcing import make

        make(server_args, view.ep_size, view.moe_a2a_backend, "cpu", 0)
    slots = shape.num_experts + server_args.ep_num_redundant_experts
    if (loads or server_args.enable_eplb) and slots % view.ep_size:
        low = max(slots // view.ep_size * view.ep_size - shape.num_experts, -shape.num_experts % view.ep_size)
        raise InputError(
            f"--ep-num-redundant-experts {server_args.ep_num_redundant_experts}: with the model's {shape.num_experts} "
            f"experts this makes {slots} slots, which do not divide over EP size {view.ep_size}; "
            f"use {low} or {low + view.ep_size}"
        )
    nodes = server_args.eplb_affinity_nodes
    if (ours or loads) and nodes is not None and (nodes < 1 or view.ep_size % nodes):
        raise InputError(f"--eplb-affinity-nodes {nodes}: must divide the EP size {view.ep_size}")
    if loads and server_args.node_rank == 0:  # the host of rank 0, which reads it for all
        # Not at the top: it needs numba, which servers that do not use this package's flags need not load.
        from sglang_eplb_affinity.sglang_hooks.initial_map import placement_of, read_initial_map, warn_of_rule

        loaded = read_initial_map(server_args.init_expert_location, placement_of(server_args, shape, view.ep_size))
        warn_of_rule(loaded, server_args)
    if ours:
        logger.info(
            "[eplb-affinity] EPLB on: rebalance every %d passes, dispatch %s, %d redundant experts, %d nodes, "
            "load at most %+.1f %% of EPLB's, %d tokens sampled per layer",
            server_args.eplb_rebalance_num_iterations,
            server_args.ep_dispatch_algorithm,
            server_args.ep_num_redundant_experts,
            nodes or server_args.nnodes,
            100 * server_args.eplb_affinity_max_load_increase,
            server_args.expert_affinity_sample_tokens,
        )


def _check_min_gain(server_args: Any) -> None:
    gain = server_args.eplb_min_gain
    if not 0 <= gain < 1:
        raise InputError(f"--eplb-min-gain {gain}: must be a fraction, 0 to below 1")
    if gain != DEFAULT_MIN_GAIN and not server_args.eplb_async and server_args.eplb_algorithm != ALGORITHM:
        raise InputError(f"--eplb-min-gain {gain}: needs --eplb-async or --eplb-algorithm affinity")


def _check_record_map(server_args: Any) -> None:
    flag = f"--eplb-record-map {server_args.eplb_record_map}"
    path = Path(server_args.eplb_record_map)
    if path.suffix != ".json":
        raise InputError(f"{flag}: must end in .json, as --init-expert-location wants it")
    if not server_args.enable_eplb:
        raise InputError(f"{flag}: there are no rebalances to record without --enable-eplb")
    if server_args.node_rank == 0 and not path.parent.is_dir():
        raise InputError(f"{flag}: the folder {path.parent} does not exist")
    if server_args.dp_size > 1 and not server_args.enable_dp_attention:
        raise InputError(
            f"{flag}: with --dp-size {server_args.dp_size} each replica has a map of its own; "
            "record with one replica, or use --enable-dp-attention"
        )
