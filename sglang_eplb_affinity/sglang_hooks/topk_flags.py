"""Which of SGLang's settings our hook at the top-k ids works with, and what it is asked to do there."""

from __future__ import annotations

from typing import Literal

from sglang_eplb_affinity.dispatch.default_rule import DispatchMode, affinity_rule, primary_tokens
from sglang_eplb_affinity.dispatch.rules import LARGE_PASS_RULE, OWN_RULES, DispatchRule
from sglang_eplb_affinity.dispatch.small_passes import most_tokens
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape
from sglang_eplb_affinity.sglang_hooks.server_arguments import ALGORITHM, ServerArguments

# Their top-k output has no ids (SGLang's BYPASSED and TRITON_KERNEL formats, layers/moe/topk.py).
_FUSED_TOP_K_BACKENDS = ("flashinfer_trtllm", "flashinfer_mxfp4", "triton_kernel", "experimental_sgl_trtllm")
# SGLang's top-k hands out logical ids in front of each of these.
_RECORDED_ALL_TO_ALL = ("none", "deepep", "mooncake", "nixl", "mori", "flashinfer", "megamoe", "pplx", "deepep_v2")

_ROLES: dict[str, Literal["prefill", "decode"]] = {"prefill": "prefill", "decode": "decode"}


def is_ours(args: ServerArguments) -> bool:
    return bool(args.enable_eplb and args.eplb_algorithm == ALGORITHM)


def records_affinity(args: ServerArguments) -> bool:
    return bool(args.enable_expert_affinity_recorder or is_ours(args))


def uses_package(args: ServerArguments) -> bool:
    """Whether anything of this package runs in the server's ranks."""
    loads, forces = args.init_expert_location != "trivial", args.ep_forced_routing is not None
    return records_affinity(args) or chooses_replicas(args) or loads or forces


def chooses_replicas(args: ServerArguments) -> bool:
    """Whether ids become physical by our rules: always with those that SGLang lacks, else where our algorithm plans."""
    if args.ep_dispatch_algorithm in OWN_RULES:
        return True
    return is_ours(args) and _our_rules_run(args)


def _our_rules_run(args: ServerArguments) -> bool:
    # Elastic expert parallelism replaces the tables that our kernel reads in place.
    return args.elastic_ep_backend is None and (args.device == "cpu" or _is_cuda())


def _is_cuda() -> bool:
    from sglang.srt.utils import is_cuda

    return bool(is_cuda())


def default_rule(args: ServerArguments) -> DispatchRule | None:
    """A better default than SGLang's, given our maps, replicas, and a mode that gains by it; else None."""
    if not is_ours(args) or args.ep_num_redundant_experts == 0 or not _our_rules_run(args):
        return None
    rule = affinity_rule(dispatch_mode(args), planned_nodes(args), _ROLES.get(args.disaggregation_mode))
    return None if rule == "static" else rule


def set_default_rule(args: ServerArguments) -> None:
    """What --ep-dispatch-algorithm is where it was not given, and how large a small pass under it."""
    args.ep_dispatch_algorithm = default_rule(args)
    if args.ep_dispatch_algorithm == "primary" and args.eplb_affinity_primary_tokens is None:
        # Who names slots for small passes wants them.
        chosen = None if args.eplb_affinity_further_slots else primary_tokens(planned_nodes(args))
        args.eplb_affinity_primary_tokens = chosen


def primary_rows(args: ServerArguments, shape: MoeShape | None) -> int:
    """Of a rank in a pass that is small under ``primary``; 0 under another rule."""
    if args.ep_dispatch_algorithm != "primary":
        return 0
    if args.eplb_affinity_primary_tokens is not None or shape is None:
        return args.eplb_affinity_primary_tokens or 0
    redundant, own_tokens = args.ep_num_redundant_experts, args.moe_a2a_backend != "none"
    return most_tokens(shape.num_experts, redundant, shape.top_k, args.ep_size, own_tokens)


def rule_text(args: ServerArguments, shape: MoeShape | None) -> str:
    """The rule of --ep-dispatch-algorithm, and what it means by the size of a pass."""
    if args.ep_dispatch_algorithm != "primary":
        return str(args.ep_dispatch_algorithm)
    in_mode = {"low_latency": "static", "auto": f"static in decode, {LARGE_PASS_RULE} in prefill"}
    large, rows = in_mode.get(str(dispatch_mode(args)), LARGE_PASS_RULE), primary_rows(args, shape)
    return f"primary (up to {rows} tokens of a rank; else {large})" if rows else f"primary ({large})"


def planned_nodes(args: ServerArguments) -> int:
    return args.eplb_affinity_nodes or args.nnodes


def dispatch_mode(args: ServerArguments) -> DispatchMode | None:
    """None for all-to-all backends that are not DeepEP."""
    modes: dict[str, DispatchMode] = {"normal": "normal", "low_latency": "low_latency", "auto": "auto"}
    if args.moe_a2a_backend == "deepep":
        return modes.get(args.deepep_mode)
    return "v2" if args.moe_a2a_backend == "deepep_v2" else None


def replaces_counts(args: ServerArguments) -> bool:
    """Whether our recorder's counts stand in for SGLang's, so that nothing is counted twice.

    SGLang counts slots, with several kernels a layer, and adds up every pass of the window at the rebalance. Its
    metrics of GPU load need that.
    """
    plans_on_ours = is_ours(args) or (args.enable_eplb and args.eplb_async)
    return plans_on_ours and not args.enable_expert_distribution_metrics


def recorded_phase(args: ServerArguments) -> Literal["prefill", "decode", "both"]:
    """Of --eplb-affinity-phase; a server of prefill-decode disaggregation runs passes of its role only."""
    if args.eplb_affinity_phase is not None:
        return args.eplb_affinity_phase
    return _ROLES.get(args.disaggregation_mode, "both")


def check_phase(args: ServerArguments) -> None:
    """--eplb-affinity-phase must name passes that the server runs, and something must be recorded."""
    phase, role = args.eplb_affinity_phase, args.disaggregation_mode
    if phase is None:
        return
    if not records_affinity(args):
        raise InputError(
            f"--eplb-affinity-phase {phase}: nothing is recorded; leave it out or give --eplb-algorithm affinity or "
            "--enable-expert-affinity-recorder"
        )
    if {phase, role} == {"prefill", "decode"}:
        raise InputError(
            f"--eplb-affinity-phase {phase}: with --disaggregation-mode {role} the server runs {role} passes only; "
            "leave it out"
        )


def check_schedule(args: ServerArguments) -> None:
    """--expert-affinity-record-every and --expert-affinity-record-last-passes must leave something to plan on."""
    every, last = args.expert_affinity_record_every, args.expert_affinity_record_last_passes
    window = args.eplb_rebalance_num_iterations
    if every < 1:
        raise InputError(f"--expert-affinity-record-every {every}: must be at least 1 (1: every pass)")
    if last is not None and not args.enable_eplb:
        raise InputError(
            f"--expert-affinity-record-last-passes {last}: counts back from a rebalance, but EPLB is off; "
            "leave it out or give --eplb-algorithm affinity"
        )
    if last is not None and not 1 <= last <= window:
        raise InputError(
            f"--expert-affinity-record-last-passes {last}: must be 1 to {window} (--eplb-rebalance-num-iterations)"
        )
    if args.enable_eplb and every > (last or window):
        raise InputError(
            f"--expert-affinity-record-every {every}: records nothing of the {last or window} passes before a "
            "rebalance; use a smaller number"
        )


def check_top_k(flag: str, args: ServerArguments) -> None:
    """Refuse ``flag`` where SGLang's top-k does not come by our hook with its logical ids."""
    if args.moe_runner_backend in _FUSED_TOP_K_BACKENDS:
        raise InputError(
            f"--moe-runner-backend {args.moe_runner_backend}: chooses experts inside its kernel, so {flag} finds "
            "no ids; use another backend, such as triton or deep_gemm"
        )
    if args.moe_a2a_backend not in _RECORDED_ALL_TO_ALL or args.device == "npu":
        where = f"--device {args.device}" if args.device == "npu" else ""
        where = where or f"--moe-a2a-backend {args.moe_a2a_backend}"
        raise InputError(
            f"{where}: its top-k hands out no logical expert ids, so {flag} finds none; works with --moe-a2a-backend "
            f"{', '.join(_RECORDED_ALL_TO_ALL)} (deepep in any --deepep-mode)"
        )


def _check_further_slots(args: ServerArguments) -> None:
    further, on_each = args.eplb_affinity_further_slots, args.ep_num_redundant_experts // max(args.ep_size, 1)
    need = None
    if further < 0:
        need = "must be 0 or more"
    elif further and args.ep_dispatch_algorithm != "primary":
        need = "needs --ep-dispatch-algorithm primary"
    elif further and args.moe_a2a_backend == "none":
        need = "needs an all-to-all backend such as --moe-a2a-backend deepep; without one all ranks must choose alike"
    elif further > on_each:
        need = (
            f"must be at most {on_each}, the slots of a GPU besides one of each expert (--ep-num-redundant-experts "
            f"{args.ep_num_redundant_experts} over {args.ep_size} GPUs)"
        )
    if need is not None:
        raise InputError(f"--eplb-affinity-further-slots {further}: {need}")


def check_own_rules(args: ServerArguments) -> None:
    """--ep-dispatch-algorithm cover, cover_balanced or primary, with whatever else is asked for."""
    most = args.eplb_affinity_primary_tokens
    if most is not None and (most < 0 or args.ep_dispatch_algorithm != "primary"):
        need = "must be 0 or more" if most < 0 else "needs --ep-dispatch-algorithm primary"
        raise InputError(f"--eplb-affinity-primary-tokens {most}: {need}")
    _check_further_slots(args)
    if args.ep_dispatch_algorithm not in OWN_RULES:
        return
    flag = f"--ep-dispatch-algorithm {args.ep_dispatch_algorithm}"
    check_top_k(flag, args)
    if args.device not in ("cuda", "cpu") or args.elastic_ep_backend is not None:
        raise InputError(
            f"{flag}: works on cuda and cpu without --elastic-ep-backend, but the device is "
            f"{args.device} and the backend {args.elastic_ep_backend}; use dynamic"
        )
