"""What the patched SGLang calls, by the names it uses; ``sglang/srt/eplb/eplb_affinity.py`` hands these on.

The same for every version of SGLang: arguments come as SGLang's own record, or not at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from sglang_eplb_affinity.dispatch.rules import OWN_RULES
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.sglang_hooks import process
from sglang_eplb_affinity.sglang_hooks.adapter import adapter
from sglang_eplb_affinity.sglang_hooks.topk_flags import uses_package


def parsed(function: Callable[..., Any], *args: Any) -> Any:
    """The command line's way to end on bad input: one line and exit code 2, no traceback."""
    try:
        return function(*args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def resolve_server_args(record: Any) -> None:
    """Early in SGLang's argument resolution: check the algorithm's name, turn EPLB on for ours."""
    from sglang_eplb_affinity.sglang_hooks import arguments

    arguments.resolve(adapter().arguments_of(record))


def check_server_args(record: Any) -> None:
    """Once parallel sizes are resolved: refuse what cannot work, in one line."""
    from sglang_eplb_affinity.sglang_hooks import arguments

    arguments.check(adapter().arguments_of(record))


def server_info(record: Any) -> dict[str, Any]:
    """What /server_info says besides the flags."""
    from sglang_eplb_affinity import __version__

    info: dict[str, Any] = {"sglang_eplb_affinity": __version__}
    if adapter().arguments_of(record).ep_forced_routing is not None:
        from sglang_eplb_affinity.device.forced_routing import NOT_THE_MODELS

        info["ep_forced_routing_note"] = NOT_THE_MODELS
    return info


def internal_state() -> dict[str, Any]:
    """What a scheduler's entry in /server_info's ``internal_states`` says besides SGLang's own: the last round."""
    return {} if process.last_round is None else {"eplb_affinity": process.last_round}


def recorder_class(base: type) -> type:
    from sglang_eplb_affinity.sglang_hooks import sglang_classes

    return sglang_classes.recorder_class(base)


def manager_class(base: type) -> type:
    from sglang_eplb_affinity.sglang_hooks import sglang_classes

    return sglang_classes.manager_class(base)


def before_placement() -> None:
    """In each rank of the target model, before EPLB's first collective call: hosts were given the same flags."""
    arguments = adapter().arguments()
    if arguments.nnodes > 1:
        from sglang_eplb_affinity.sglang_hooks import host_agreement

        host_agreement.check_hosts(arguments)


def load_expert_location(model_config: Any, ep_rank: int) -> Any:
    """The map given to --init-expert-location as SGLang's metadata; None where SGLang has to read it."""
    from sglang_eplb_affinity.sglang_hooks import loaded_map

    return loaded_map.load(process.settings(), model_config, ep_rank)


def placement_in_force(model_runner: Any, rank: int) -> None:
    """In each rank of the target model, once the first map is in force and before the recorder is made."""
    if not uses_package(adapter().arguments()):
        return
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    from sglang_eplb_affinity.sglang_hooks import forcing, location, observing, topk_step

    settings, metadata = process.settings(), get_global_expert_location_metadata()
    if metadata is None and (settings.eplb or settings.records or settings.loads_map):
        raise InputError(
            f"{settings.model_path}: SGLang does not say how many experts {settings.architecture} has "
            "(get_model_config_for_expert_location), so they can be neither placed nor recorded; leave out EPLB, "
            "--init-expert-location and recording"
        )
    observing.start(settings, adapter().dp_rank(model_runner))
    if settings.forced_routing is not None:
        process.forced_routing = forcing.init(settings, rank)
    if settings.table_rule == "primary" and metadata is not None:
        location.with_primaries(metadata, settings.topology, settings.planner.further_slots, rank)
    if settings.chooses_replicas:
        process.topk_step = topk_step.TopkStep(settings, metadata, None)


def weights_loaded(model_runner: Any) -> None:
    """In each rank, once its weights are loaded and before its KV cache is sized: what experts are to move, or refuse
    to; with --eplb-async the rebalancer."""
    if model_runner.is_draft_worker:
        return
    from sglang_eplb_affinity.sglang_hooks import expert_weights

    arguments = adapter().arguments()
    expert_weights.check(model_runner, arguments)
    if model_runner.eplb_manager is not None and arguments.eplb_async:
        from sglang_eplb_affinity.sglang_hooks import async_rebalance

        model_runner.eplb_manager.affinity_rebalancer = async_rebalance.start(model_runner, process.settings())


def weights_change(model_runner: Any) -> None:
    """New weights are about to be loaded into a running model: nothing staged before may be committed after."""
    rebalancer = getattr(getattr(model_runner, "eplb_manager", None), "affinity_rebalancer", None)
    if rebalancer is not None:
        rebalancer.weights_changed()


def keeps_all_replicas() -> bool:
    """Whether a rank's table must list every replica, not the nearest only, with an all-to-all too."""
    return bool(adapter().arguments().ep_dispatch_algorithm in OWN_RULES)


def known_dispatch_info(metadata: Any, layer: int) -> Any:
    return None if process.topk_step is None else process.topk_step.known_info(metadata, layer)


def remember_dispatch_info(metadata: Any, layer: int, info: Any) -> None:
    if process.topk_step is not None:
        process.topk_step.remember_info(metadata, layer, info)


def forces_routing() -> bool:
    return process.forced_routing is not None


def force_routing(layer: int, topk_ids: Any, num_token_non_padded: Any) -> None:
    if process.forced_routing is not None:
        process.forced_routing.apply(layer, topk_ids, num_token_non_padded)


def on_topk(layer: int | None, topk_ids: Any, num_token_non_padded: Any, info: Any) -> bool:
    """Top-k ids of a layer while they are logical; True if they are physical now, in place, with padding masked."""
    if process.topk_step is None:
        return False
    return process.topk_step(layer, topk_ids, num_token_non_padded, info)
