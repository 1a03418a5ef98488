"""Flags of SGLang with which moved experts would be served wrong, or a rebalance would hang: refused at start-up."""

from __future__ import annotations

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.sglang_hooks.server_arguments import ServerArguments

# Adapters on these leave the experts alone.
_ATTENTION_ONLY = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "embed_tokens", "lm_head"})


def check_placed(args: ServerArguments, flag: str) -> None:
    """Of any map that is not SGLang's trivial one, from ``flag``: EPLB, or a loaded map."""
    targets = set(args.lora_target_modules or ())
    if args.enable_lora and not (targets and targets <= _ATTENTION_ONLY):
        raise InputError(
            f"--enable-lora: adapters of experts are kept by contiguous expert ids, so with {flag} they would act on "
            f"other experts; give --lora-target-modules of attention only ({', '.join(sorted(_ATTENTION_ONLY))})"
        )


def check_elastic(args: ServerArguments) -> None:
    """Of elastic EP with our planner: ranks may go, none may come that the server did not start with."""
    if args.elastic_ep_backend is None:
        return
    if args.max_ep_size is not None and args.max_ep_size > args.tp_size:
        raise InputError(
            f"--max-ep-size {args.max_ep_size}: --eplb-algorithm affinity plans for the {args.tp_size} ranks that the "
            "server starts with, and none that join later; leave it out, or use --eplb-algorithm elasticity_aware"
        )
    if args.eplb_rebalance_layers_per_chunk is not None:
        raise InputError(
            f"--eplb-rebalance-layers-per-chunk {args.eplb_rebalance_layers_per_chunk}: a rank that is lost between "
            "two chunks would come back into the map with the second; leave it out with --elastic-ep-backend"
        )


def check_moving(args: ServerArguments, flag: str) -> None:
    """Of EPLB with our planner or our rounds."""
    if args.pp_size > 1:
        raise InputError(f"--pp-size {args.pp_size}: pipeline stages do not rebalance together with {flag}; use 1")
    mode = args.weight_cache_mode
    if mode != "off":
        raise InputError(
            f"--weight-cache-mode {mode}: {flag} would move experts in the daemon's copy of the weights, which other "
            "servers share; use off"
        )
    for name in ("moe_runner_backend", "moe_a2a_backend"):
        if getattr(args, name) == "flashinfer_megamoe":
            raise InputError(
                f"--{name.replace('_', '-')} flashinfer_megamoe: keeps experts' weights in objects of its own, "
                f"where {flag} cannot move them; use another backend, such as deepep with deep_gemm"
            )
    if not args.eplb_async and args.ep_size != args.tp_size:
        raise InputError(
            f"--ep-size {args.ep_size}: SGLang's synchronous rebalance takes the tensor-parallel rank for the expert-"
            f"parallel one, and --tp-size is {args.tp_size}; make them equal, or give --eplb-async"
        )
    if args.eplb_async and args.enable_pdmux:
        raise InputError(
            "--enable-pdmux: prefill and decode run at the same time there, so --eplb-async could change weights "
            "in the middle of a pass; leave out one of the two"
        )
    if args.eplb_async and args.enable_memory_saver:
        raise InputError(
            "--enable-memory-saver: /release_memory_occupation takes weights away that --eplb-async may be moving; "
            "leave out one of the two"
        )
