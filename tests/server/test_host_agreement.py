"""Flags that differ between hosts are named before ranks can wait for each other; no server is started."""

import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.sglang_hooks import host_agreement
from sglang_eplb_affinity.sglang_hooks.server_arguments import ADDED

DEFAULTS = {name: None for name in (*ADDED, *host_agreement.UPSTREAM)} | {
    "enable_eplb": True,
    "enable_expert_affinity_recorder": False,
    "expert_load_log_passes": 0,
    "init_expert_location": "trivial",
    "nnodes": 2,
}


def outcome(flags_of_hosts: list[dict], ranks_of_host: int = 2) -> list[str]:
    """What each rank raises (or ""), host by host."""
    store, found = dist.HashStore(), [""] * (ranks_of_host * len(flags_of_hosts))

    def run(rank: int) -> None:
        node = rank // ranks_of_host
        args = SimpleNamespace(**DEFAULTS | {"node_rank": node, "nnodes": len(flags_of_hosts)} | flags_of_hosts[node])
        try:
            host_agreement.check(args, store, rank, len(found), timedelta(seconds=1))
        except InputError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_same_flags_pass_and_files_of_the_first_host_may_differ() -> None:
    first = {"eplb_record_map": "/maps/new.json", "init_expert_location": "/maps/map.json"}
    assert outcome([first, {"init_expert_location": "/elsewhere.json"}, first]) == [""] * 6


@pytest.mark.parametrize(("flags", "named"), [
    ({"eplb_async": True}, "--eplb-async (None at --node-rank 0, True at 1)"),
    ({"enable_eplb": False}, "--enable-eplb (True at --node-rank 0, False at 1)"),
    ({"init_expert_location": "a.json"}, "--init-expert-location other than trivial (False at --node-rank 0, True"),
    ({"expert_affinity_sample_tokens": 5, "eplb_min_gain": 0.5}, "--eplb-min-gain (None at --node-rank 0, 0.5 at 1)"),
])  # fmt: skip
def test_every_rank_with_eplb_names_what_differs(flags: dict, named: str) -> None:
    found = outcome([{}, flags, {}])
    using = [0, 1, 4, 5] if flags.get("enable_eplb") is False else range(6)
    assert all(named in found[rank] and "all hosts of a server need the same" in found[rank] for rank in using), found


def test_a_host_that_tells_nothing_is_named() -> None:
    args = SimpleNamespace(**DEFAULTS, node_rank=0)
    with pytest.raises(
        InputError, match=r"host with --node-rank 1 told no flags of EPLB within 1 s; is its SGLang patched"
    ):
        host_agreement.check(args, dist.HashStore(), 0, 2, timedelta(seconds=1))


def test_without_eplb_nobody_waits() -> None:
    args = SimpleNamespace(**DEFAULTS | {"enable_eplb": False}, node_rank=0)
    host_agreement.check(args, dist.HashStore(), 0, 2, timedelta(hours=1))
