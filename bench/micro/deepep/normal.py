"""DeepEP normal mode (prefill): one copy of a token for each destination GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.micro.deepep.cases import Case, copies, topk_ids
from bench.micro.deepep.timing import Repeats, time_stages


def open_buffer(group: Any, largest_hidden: int) -> Any:
    """A DeepEP buffer with the default configurations, as SGLang opens it."""
    import deep_ep

    size = group.size()
    configs = (deep_ep.Buffer.get_dispatch_config(size), deep_ep.Buffer.get_combine_config(size))
    num_bytes = max(config.get_nvl_buffer_size_hint(largest_hidden * 2, size) for config in configs)
    return deep_ep.Buffer(group, int(num_bytes), 0)


def measure(case: Case, buffer: Any, plan: Repeats, num_experts: int, top_k: int) -> tuple[np.ndarray, dict[str, Any]]:
    """us [3, repeats, iterations] of dispatch, combine and the full dispatch; and the routing's copies per token.

    ``dispatch`` reuses the layout (kernel time, as in DeepEP's own tables). The full dispatch computes the layout and
    waits for the received counts on the CPU: what an engine pays.
    """
    import deep_ep

    rank, world = dist.get_rank(), dist.get_world_size()
    ids = topk_ids(case, rank, world, num_experts, top_k)
    local, remote = copies(ids, rank, world, num_experts)
    index = torch.from_numpy(ids).cuda().to(getattr(deep_ep, "topk_idx_t", torch.int64))
    weights = torch.rand(case.tokens, top_k, dtype=torch.float32, device="cuda")
    x: Any = torch.randn(case.tokens, case.hidden, dtype=torch.bfloat16, device="cuda")
    if case.dtype == "fp8":
        scales = torch.ones(case.tokens, case.hidden // 128, dtype=torch.float32, device="cuda")
        x = (x.to(torch.float8_e4m3fn), scales)

    def full_dispatch() -> Any:
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(index, num_experts)
        return buffer.dispatch(
            x,
            topk_idx=index,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )

    received, _, _, _, handle, _ = full_dispatch()
    rows = (received[0] if isinstance(received, tuple) else received).shape[0]
    output = torch.randn(rows, case.hidden, dtype=torch.bfloat16, device="cuda")
    dist.barrier()
    kernels = time_stages(
        [
            lambda: buffer.dispatch(x, handle=handle),
            lambda: buffer.combine(output, handle),
        ],
        plan,
    )
    dist.barrier()
    full = time_stages([full_dispatch], plan, head_start=False)
    extra = {"copies_local": local, "copies_remote": remote, "received_tokens": int(rows)}
    return np.concatenate([kernels, full]), extra
