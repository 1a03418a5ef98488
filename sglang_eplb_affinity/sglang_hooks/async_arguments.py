"""The flags of --eplb-async: what they mean together, and one line for what cannot work."""

from __future__ import annotations

import dataclasses

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.rebalance.config import AsyncConfig
from sglang_eplb_affinity.sglang_hooks.server_arguments import ServerArguments

_FLAGS = {
    "eplb_async_layers_in_flight": "layers_in_flight",
    "eplb_async_warm_up_passes": "warm_up",
    "eplb_async_run_once": "run_once",
    "eplb_async_phase_limit": "phase_limit_seconds",
}
ALGORITHMS = ("affinity", "auto", "deepseek", "deepseek_hierarchical")


def config_of(args: ServerArguments) -> AsyncConfig:
    """Raises InputError naming the flag that is out of range."""
    values = {field: getattr(args, flag) for flag, field in _FLAGS.items()}
    return AsyncConfig(interval=args.eplb_rebalance_num_iterations, **values)


def resolve(args: ServerArguments) -> None:
    """Early: ranges, and the recorder that planning needs."""
    if not args.eplb_async:
        defaults = {field.name: field.default for field in dataclasses.fields(AsyncConfig)}
        for flag, field in _FLAGS.items():
            if getattr(args, flag) != defaults[field]:
                raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: needs --eplb-async")
        return
    if not args.enable_eplb:
        raise InputError("--eplb-async: needs --enable-eplb (which --eplb-algorithm affinity turns on)")
    if args.eplb_algorithm not in ALGORITHMS:
        raise InputError(
            f"--eplb-async: plans with {', '.join(ALGORITHMS)}, not with --eplb-algorithm {args.eplb_algorithm}"
        )
    config_of(args)
    args.enable_expert_affinity_recorder = True


def check(args: ServerArguments) -> None:
    """Once parallel sizes are resolved."""
    if not args.eplb_async:
        return
    refused = {
        "--elastic-ep-backend": (
            args.elastic_ep_backend is not None,
            args.elastic_ep_backend,
            "leave the flag out",
        ),
        "--ep-dispatch-algorithm": (
            args.ep_dispatch_algorithm in ("lp", "fake"),
            args.ep_dispatch_algorithm,
            "use dynamic, static, cover, cover_balanced or primary",
        ),
        "--eplb-rebalance-layers-per-chunk": (
            args.eplb_rebalance_layers_per_chunk is not None,
            args.eplb_rebalance_layers_per_chunk,
            "use --eplb-async-layers-in-flight",
        ),
        "--eplb-min-rebalancing-utilization-threshold": (
            args.eplb_min_rebalancing_utilization_threshold < 1,
            args.eplb_min_rebalancing_utilization_threshold,
            "use --eplb-min-gain",
        ),
    }
    for flag, (wrong, value, instead) in refused.items():
        if wrong:
            raise InputError(f"{flag} {value}: does not go with --eplb-async; {instead}")
    if args.ep_size < 2:
        raise InputError(f"--eplb-async: needs expert parallelism, but the EP size is {args.ep_size}; give --ep-size")
