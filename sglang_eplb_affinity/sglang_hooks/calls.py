"""What the patched SGLang calls, by the names it uses; ``sglang/srt/eplb/eplb_affinity.py`` hands these on.

The same for every version of SGLang: arguments come as SGLang's own record, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_eplb_affinity import sglang_hooks as hooks
from sglang_eplb_affinity.dispatch.rules import COVER_RULES
from sglang_eplb_affinity.sglang_hooks.adapter import adapter


def parsed(function: Callable[..., Any], *args: Any) -> Any:
    """The command line's parsing: bad input ends in one line and exit code 2."""
    return hooks.exit_on_input_error(function, *args)


def resolve_server_args(record: Any) -> None:
    hooks.resolve_server_args(adapter().arguments_of(record))


def check_server_args(record: Any) -> None:
    hooks.check_server_args(adapter().arguments_of(record))


def server_info(record: Any) -> dict[str, Any]:
    return hooks.server_info(adapter().arguments_of(record))


def recorder_class(base: type) -> type:
    from sglang_eplb_affinity.sglang_hooks import sglang_classes

    return sglang_classes.recorder_class(base)


def manager_class(base: type) -> type:
    from sglang_eplb_affinity.sglang_hooks import sglang_classes

    return sglang_classes.manager_class(base)


def before_placement() -> None:
    """In each rank of the target model, before EPLB's first collective call."""
    hooks.check_hosts(adapter().arguments())


def load_expert_location(model_config: Any, ep_rank: int) -> Any:
    return hooks.load_expert_location(adapter().arguments(), model_config, ep_rank)


def placement_in_force(model_runner: Any, rank: int) -> None:
    """In each rank of the target model, once the first map is in force and before the recorder is made."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    arguments = adapter().arguments()
    hooks.start_observing(arguments, adapter().dp_rank(model_runner))
    if arguments.ep_forced_routing is not None:
        hooks.init_forced_routing(arguments, rank)
    hooks.init_topk_step(arguments, get_global_expert_location_metadata())


def weights_loaded(model_runner: Any) -> None:
    """In each rank, once its weights are loaded and before its KV cache is sized."""
    if not model_runner.is_draft_worker:
        hooks.weights_loaded(model_runner, adapter().arguments())


def weights_change(model_runner: Any) -> None:
    hooks.weights_change(model_runner)


def keeps_all_replicas() -> bool:
    """Whether a rank's table must list every replica, not the nearest only, with an all-to-all too."""
    return bool(adapter().arguments().ep_dispatch_algorithm in COVER_RULES)


def known_dispatch_info(metadata: Any, layer: int) -> Any:
    return None if hooks.topk_step is None else hooks.topk_step.known_info(metadata, layer)


def remember_dispatch_info(metadata: Any, layer: int, info: Any) -> None:
    if hooks.topk_step is not None:
        hooks.topk_step.remember_info(metadata, layer, info)


def forces_routing() -> bool:
    return hooks.forced_routing is not None


def force_routing(layer: int, topk_ids: Any, num_token_non_padded: Any) -> None:
    if hooks.forced_routing is not None:
        hooks.forced_routing.apply(layer, topk_ids, num_token_non_padded)


def on_topk(layer: int | None, topk_ids: Any, num_token_non_padded: Any, info: Any) -> bool:
    """Top-k ids of a layer while they are logical; True if they are physical now, in place, with padding masked."""
    if hooks.topk_step is None:
        return False
    return hooks.topk_step(layer, topk_ids, num_token_non_padded, info)
