"""DeepEP V2 (ElasticBuffer), called as SGLang 0.5.23 calls it: one copy of a token for each destination GPU.

Decode is captured in a CUDA graph and does not wait for the received counts on the CPU; prefill runs eagerly and does
(token_dispatcher/deepep_v2.py). Both ask for the expanded layout, one row per (token, expert), which the receiving GPU
makes out of the copy that it got.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.micro.deepep.cases import Case, copies, topk_ids
from bench.micro.deepep.timing import Repeats, time_graph, time_stages

EXPERT_ALIGNMENT = 128  # DeepGEMM's, as in SGLang


def open_buffer(group: Any, hidden: int, max_tokens: int, top_k: int) -> Any:
    """An ElasticBuffer in direct mode, as SGLang opens it on one host."""
    import deep_ep

    return deep_ep.ElasticBuffer(
        group,
        num_max_tokens_per_rank=max_tokens,
        hidden=hidden,
        num_topk=top_k,
        use_fp8_dispatch=False,
        allow_hybrid_mode=False,
        sl_idx=0,
        prefer_overlap_with_compute=False,
    )


def measure(
    case: Case, buffer: Any, plan: Repeats, num_experts: int, top_k: int, max_tokens: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """us [stages, repeats, iterations] of dispatch and combine, in a graph also of both; and the copies per token.

    Raises RuntimeError if what comes back from combine is not what was sent.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    ids = topk_ids(case, rank, world, num_experts, top_k)
    local, remote = copies(ids, rank, world, num_experts)
    index = torch.from_numpy(ids).cuda()
    weights = torch.rand(case.tokens, top_k, dtype=torch.float32, device="cuda")
    x = torch.randn(case.tokens, case.hidden, dtype=torch.bfloat16, device="cuda")
    sent: Any = x
    if case.dtype == "fp8":
        sent = (x.to(torch.float8_e4m3fn), torch.ones(case.tokens, case.hidden // 128, device="cuda"))
    graph = case.mode == "v2_graph"
    state: dict[str, Any] = {}

    def dispatch() -> None:
        state["received"], _, _, state["handle"], _ = buffer.dispatch(
            sent,
            topk_idx=index,
            topk_weights=weights,
            num_experts=num_experts,
            num_max_tokens_per_rank=max_tokens,
            expert_alignment=EXPERT_ALIGNMENT,
            do_cpu_sync=not graph,
            do_expand=True,
        )

    dispatch()
    received = state["received"]
    rows = received[0] if isinstance(received, tuple) else received
    output = rows if case.dtype == "bf16" else torch.zeros(len(rows), case.hidden, dtype=torch.bfloat16, device="cuda")

    def combine() -> None:
        state["combined"] = buffer.combine(output, handle=state["handle"])[0]

    combine()
    torch.cuda.synchronize()
    handle = state["handle"]
    extra = {
        "copies_local": local,
        "copies_remote": remote,
        "max_tokens": max_tokens,
        "received_copies": int(handle.psum_num_recv_tokens_per_scaleup_rank[-1].item()),
        "num_sms": int(handle.num_sms),
    }
    # Every expert gives back what it got, so a token comes back once for each of its experts.
    if case.dtype == "bf16" and not torch.allclose(state["combined"].float(), x.float() * top_k, rtol=0.02, atol=0.1):
        raise RuntimeError(f"{case}: combine does not give back top-k times the tokens")
    dist.barrier()
    times = time_stages([dispatch, combine], plan, head_start=graph)
    if not graph:
        return times, extra
    dist.barrier()
    return np.concatenate([times, time_graph([dispatch, combine], plan)]), extra
