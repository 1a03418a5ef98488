"""A server over several hosts is started by one command on each, and they must agree.

Ranks that differ in a flag of EPLB wait for each other in collective calls that the others never make, without a word.
So each host tells its flags in the process group's store, which can be read whatever the others do, before the first
of those calls.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from sglang_eplb_affinity import __version__
from sglang_eplb_affinity.dispatch.rules import OWN_RULES
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.rebalance import verify
from sglang_eplb_affinity.sglang_hooks.server_arguments import ADDED, ServerArguments
from sglang_eplb_affinity.sglang_hooks.topk_flags import records_affinity

_HOST, _READ = "sglang_eplb_affinity/host/", "sglang_eplb_affinity/read/"
# The other hosts are past the same barrier, some imports away.
_WAIT = timedelta(seconds=300)
_FAREWELL = timedelta(seconds=10)
# SGLang's own flags that decide which collective calls are made, and with what shapes.
UPSTREAM = (
    "deepep_mode",
    "enable_eplb",
    "enable_expert_distribution_metrics",
    "ep_dispatch_algorithm",
    "ep_num_redundant_experts",
    "eplb_algorithm",
    "eplb_min_rebalancing_utilization_threshold",
    "eplb_rebalance_layers_per_chunk",
    "eplb_rebalance_num_iterations",
    "expert_distribution_recorder_buffer_size",
    "expert_distribution_recorder_mode",
    "moe_a2a_backend",
)
_OF_FIRST_HOST = ("eplb_record_map",)  # rank 0 writes the file


def told_by(args: ServerArguments) -> dict[str, Any]:
    """What this host tells: flag or other name, and its value."""
    names = [name for name in sorted({*ADDED, *UPSTREAM}) if name not in _OF_FIRST_HOST]
    told = {"--" + name.replace("_", "-"): getattr(args, name) for name in names}
    # Rank 0 reads the file; its name may differ, or the file be missing elsewhere.
    told["--init-expert-location other than trivial"] = args.init_expert_location != "trivial"
    told["the version of sglang_eplb_affinity"] = __version__
    told[verify.ENVIRONMENT] = os.environ.get(verify.ENVIRONMENT)
    return {name: value if isinstance(value, str | int | float | None) else str(value) for name, value in told.items()}


def uses_eplb(args: ServerArguments) -> bool:
    """Whether this host was told of EPLB, a map, recording or forced routing at all."""
    return bool(
        args.enable_eplb
        or records_affinity(args)
        or args.ep_forced_routing is not None
        or args.init_expert_location != "trivial"
        or args.ep_dispatch_algorithm in OWN_RULES
    )


def check(args: ServerArguments, store: dist.Store, rank: int, num_ranks: int, wait: timedelta = _WAIT) -> None:
    """On every rank: raise InputError, the same on all that use EPLB, unless all hosts were given the same."""
    store.set(f"{_HOST}{args.node_rank}", json.dumps(told_by(args)))
    if not uses_eplb(args):
        return
    first: dict[str, Any] = {}
    for node in range(args.nnodes):
        theirs = _told(store, node, wait)
        first = first or theirs
        if text := _differences(first, theirs, node):
            _let_others_read(store, rank, num_ranks)
            raise InputError(text)


def _told(store: dist.Store, node: int, wait: timedelta) -> dict[str, Any]:
    try:
        store.wait([f"{_HOST}{node}"], wait)
        return dict(json.loads(store.get(f"{_HOST}{node}")))
    except dist.DistNetworkError:
        raise InputError("lost the connection to the host with --node-rank 0; its log says why") from None
    except RuntimeError:
        raise InputError(
            f"the host with --node-rank {node} told no flags of EPLB within {wait.total_seconds():.0f} s; "
            "is its SGLang patched (`make status` there)?"
        ) from None


def _differences(first: dict[str, Any], theirs: dict[str, Any], node: int) -> str:
    names = [name for name in sorted({*first, *theirs}) if first.get(name) != theirs.get(name)]
    pairs = ", ".join(f"{name} ({first.get(name)} at --node-rank 0, {theirs.get(name)} at {node})" for name in names)
    return f"hosts differ in {pairs}; all hosts of a server need the same" if names else ""


def _let_others_read(store: dist.Store, rank: int, num_ranks: int) -> None:
    """The store ends with rank 0: the others shall have read what they stop for. Those without EPLB do not answer."""
    store.set(f"{_READ}{rank}", "")
    if rank == 0:
        with suppress(RuntimeError):
            store.wait([f"{_READ}{other}" for other in range(num_ranks)], _FAREWELL)


def check_hosts(args: ServerArguments) -> None:
    """The hook, for servers of several hosts; nothing where hosts come and go (elastic EP).

    A host that uses neither EPLB nor anything of this package tells so and does not wait for the others.
    """
    from sglang.srt.runtime_context import get_parallel
    from torch.distributed.distributed_c10d import _get_default_store

    if args.elastic_ep_backend is None and get_parallel().elastic_ep_initial_size is None:
        check(args, _get_default_store(), dist.get_rank(), dist.get_world_size())
