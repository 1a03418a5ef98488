"""DeepEP low-latency mode (decode): one copy for each (token, expert)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.micro.deepep.cases import Case, copies, topk_ids
from bench.micro.deepep.timing import Repeats, time_graph, time_stages


def open_buffer(group: Any, hidden: int, max_tokens: int, num_experts: int) -> Any:
    import deep_ep

    size = group.size()
    num_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, size, num_experts)
    return deep_ep.Buffer(group, 0, int(num_bytes), low_latency_mode=True, num_qps_per_rank=num_experts // size)


def measure(
    case: Case, buffer: Any, plan: Repeats, num_experts: int, top_k: int, max_tokens: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """us [3, repeats, iterations] of dispatch, combine and both in a CUDA graph; and the copies per token.

    Copies are told apart by whether they stay on the GPU or travel.
    """
    import deep_ep

    rank, world = dist.get_rank(), dist.get_world_size()
    ids = topk_ids(case, rank, world, num_experts, top_k)
    local, remote = copies(ids, rank, world, num_experts)
    on_rank = float((ids // (num_experts // world) == rank).sum(1).mean())
    index = torch.from_numpy(ids).cuda().to(getattr(deep_ep, "topk_idx_t", torch.int64))
    weights = torch.rand(case.tokens, top_k, dtype=torch.float32, device="cuda")
    x = torch.randn(case.tokens, case.hidden, dtype=torch.bfloat16, device="cuda")
    use_fp8 = case.dtype == "fp8"
    output = torch.randn(num_experts // world, max_tokens * world, case.hidden, dtype=torch.bfloat16, device="cuda")
    state: dict[str, Any] = {}

    def dispatch() -> None:
        _, _, state["handle"], _, _ = buffer.low_latency_dispatch(x, index, max_tokens, num_experts, use_fp8=use_fp8)

    def combine() -> None:
        buffer.low_latency_combine(output, index, weights, state["handle"])

    dist.barrier()
    times = np.concatenate([time_stages([dispatch, combine], plan), time_graph([dispatch, combine], plan)])
    extra = {
        "copies_local": local,
        "copies_remote": remote,
        "expert_copies_local": on_rank,
        "expert_copies_remote": top_k - on_rank,
    }
    return times, extra
