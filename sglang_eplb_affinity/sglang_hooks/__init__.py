"""What runs inside SGLang. This is the only part of the package that imports SGLang, and it does so late.

SGLang's side is one small module that the series adds, ``sglang/srt/eplb/eplb_affinity.py``; calls.py is what it calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_eplb_affinity.device.forced_routing import ForcedRouting
    from sglang_eplb_affinity.sglang_hooks.rebalance import RebalanceRound
    from sglang_eplb_affinity.sglang_hooks.recording import ServerRecorder
    from sglang_eplb_affinity.sglang_hooks.topk_step import TopkStep

ALGORITHM = "affinity"

topk_step: TopkStep | None = None
"""Set by :func:`init_topk_step`: replica choice and recording at every layer; None if both are SGLang's."""

forced_routing: ForcedRouting | None = None
"""Set by :func:`init_forced_routing`; the hook in topk.py reads it for every layer, so None must cost nothing."""


def exit_on_input_error(function: Callable[..., Any], *args: Any) -> Any:
    """The command line's way to end on bad input: one line and exit code 2, no traceback."""
    from sglang_eplb_affinity.domain.errors import InputError

    try:
        return function(*args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def resolve_server_args(server_args: Any) -> None:
    """Early in SGLang's argument resolution: check the algorithm's name, turn EPLB on for ours."""
    from sglang_eplb_affinity.sglang_hooks import arguments

    arguments.resolve(server_args)


def check_server_args(server_args: Any) -> None:
    """Once parallel sizes are resolved: refuse what cannot work, in one line."""
    from sglang_eplb_affinity.sglang_hooks import arguments

    arguments.check(server_args)


def check_hosts(server_args: Any) -> None:
    """In each rank of the target model, before the first collective call of EPLB: hosts were given the same flags."""
    if server_args.nnodes > 1:
        from sglang_eplb_affinity.sglang_hooks import host_agreement

        host_agreement.check_hosts(server_args)


def init_forced_routing(server_args: Any, rank: int) -> None:
    """In each rank's process, before the first forward pass, if --ep-forced-routing is given."""
    global forced_routing
    from sglang_eplb_affinity.sglang_hooks import forcing

    forced_routing = forcing.init(server_args, rank)


def server_info(server_args: Any) -> dict[str, Any]:
    """What /server_info says besides the flags."""
    from sglang_eplb_affinity import __version__

    info: dict[str, Any] = {"sglang_eplb_affinity": __version__}
    if server_args.ep_forced_routing is not None:
        from sglang_eplb_affinity.device.forced_routing import NOT_THE_MODELS

        info["ep_forced_routing_note"] = NOT_THE_MODELS
    return info


def init_topk_step(server_args: Any, metadata: Any, recorder: ServerRecorder | None = None) -> None:
    """In each rank's process, once the placement is known and again once the recorder is."""
    global topk_step
    from sglang_eplb_affinity.sglang_hooks.topk_flags import chooses_replicas

    if recorder is None and not chooses_replicas(server_args):
        return
    from sglang_eplb_affinity.sglang_hooks.topk_step import TopkStep

    topk_step = TopkStep(server_args, metadata, recorder)


def replaces_counts(server_args: Any) -> bool:
    """Whether SGLang need not count, because our recorder does."""
    from sglang_eplb_affinity.sglang_hooks import topk_flags

    return topk_flags.replaces_counts(server_args)


def make_recorder(server_args: Any, expert_location_metadata: Any, owner: Any) -> ServerRecorder | None:
    """The affinity recorder of this rank, None if it is off; ``owner`` is SGLang's recorder."""
    from sglang_eplb_affinity.sglang_hooks import recording

    recorder = recording.make(server_args, expert_location_metadata, owner)
    if recorder is not None:
        init_topk_step(server_args, expert_location_metadata, recorder)
        from sglang_eplb_affinity.sglang_hooks import rebalance

        rebalance.warm_up_planner(server_args)
    return recorder


def load_expert_location(server_args: Any, model_config: Any, moe_ep_rank: int) -> Any:
    """The map given to --init-expert-location as SGLang's metadata; None where SGLang has to read it."""
    from sglang_eplb_affinity.sglang_hooks import loaded_map

    return loaded_map.load(server_args, model_config, moe_ep_rank)


def start_observing(server_args: Any, dp_rank: int | None) -> None:
    """Once the first map is in force, in every rank of the target model: who is told of rebalance rounds."""
    from sglang_eplb_affinity.sglang_hooks import observing

    observing.start(server_args, dp_rank)


def begin_round(manager: Any, window: Any) -> RebalanceRound | None:
    """A rebalance of SGLang's EPLB manager begins; None if there is no affinity record (``window``) to work with."""
    from sglang_eplb_affinity.sglang_hooks import rebalance

    return rebalance.begin(manager, window)


def weights_loaded(model_runner: Any, arguments: Any) -> None:
    """Once a rank's weights are loaded, before its KV cache is sized: what experts are to move, or refuse to; with
    --eplb-async the rebalancer."""
    from sglang_eplb_affinity.sglang_hooks import expert_weights

    expert_weights.check(model_runner, arguments)
    if model_runner.eplb_manager is None or not arguments.eplb_async:
        return
    from sglang_eplb_affinity.sglang_hooks import async_rebalance

    model_runner.eplb_manager.affinity_rebalancer = async_rebalance.start(model_runner, arguments)


def weights_change(model_runner: Any) -> None:
    """New weights are about to be loaded into a running model: nothing staged before may be committed after."""
    rebalancer = getattr(getattr(model_runner, "eplb_manager", None), "affinity_rebalancer", None)
    if rebalancer is not None:
        rebalancer.weights_changed()
