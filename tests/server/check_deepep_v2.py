"""What SGLang's DeepEP V2 dispatcher gets and hands over behind our top-k step; prints one JSON line of findings.

Runs in a Python with patched SGLang, with a stand-in for ElasticBuffer that keeps what it is given.
"""

import json
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from tests.sglang_hooks.arguments import server_arguments

SLOTS = torch.tensor([0, 1, 2, 3, 0, 1])  # two ranks of three slots; experts 0 and 1 are on both
HIDDEN, TOP_K, RANK = 128, 2, 1
PREFILL = [[0, 1], [2, 3], [0, 3], [1, 2], [3, 1]]  # the last row is padding
DECODE = [[3, 0], [1, 0], [2, 1], [0, 2]]  # the last two are
PASSES = {"prefill": (True, PREFILL, 4), "decode": (False, DECODE, 2), "idle prefill": (True, [], 0)}


class Buffer:
    """ElasticBuffer in expanded layout, as far as the dispatcher looks at it: a row for each (token, expert)."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def dispatch(self, x: torch.Tensor, *, topk_idx: torch.Tensor, topk_weights: torch.Tensor, **rest: Any) -> Any:
        self.given = {"topk_idx": topk_idx, "topk_weights": topk_weights, **rest}
        rows = topk_idx.numel()
        handle = SimpleNamespace(psum_num_recv_tokens_per_expert=None)
        return x.new_zeros((rows, HIDDEN)), None, torch.zeros(rows), handle, SimpleNamespace(event=None)

    def combine(self, x: torch.Tensor, *, handle: Any, topk_weights: Any) -> Any:
        return x.new_zeros((len(self.given["topk_idx"]), HIDDEN)), None, SimpleNamespace(event=None)


def main() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.eplb import expert_distribution
    from sglang.srt.layers.moe.token_dispatcher import deepep_v2
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from sglang_eplb_affinity.sglang_hooks.recording import ServerRecorder
    from sglang_eplb_affinity.sglang_hooks.settings import Settings
    from sglang_eplb_affinity.sglang_hooks.topk_step import TopkStep

    settings = Settings.of(server_arguments(moe_a2a_backend="deepep_v2", ep_dispatch_algorithm="cover"))
    replicas = torch.from_numpy(ExpertMap(SLOTS[None].numpy().astype("int32"), 4).logical_to_all_physical()[0]).long()
    info = SimpleNamespace(
        ep_dispatch_algorithm="cover",
        partial_logical_to_rank_dispatch_physical_map=replicas[:, 0].contiguous(),
        partial_logical_to_all_physical_map=torch.nn.functional.pad(replicas, (0, 6 - replicas.shape[1]), value=-1),
        partial_logical_to_all_physical_map_num_valid=(replicas >= 0).sum(1),
    )
    metadata = SimpleNamespace(num_layers=3, num_logical_experts=4, num_physical_experts=6)
    attention = dict(attn_dp_size=1, attn_cp_size=1, attn_cp_rank=0, attn_tp_size=1, attn_tp_rank=0)
    parallel = SimpleNamespace(moe_ep_rank=RANK, moe_tp_rank=0, **attention)
    buffer, extend = Buffer(), [True]
    found: dict[str, Any] = {}
    with (
        mock.patch("sglang.srt.runtime_context.get_parallel", lambda: parallel),
        mock.patch.object(deepep_v2, "use_deepep_v2", True),
        mock.patch.object(deepep_v2, "get_is_extend_in_batch", lambda: extend[0]),
        mock.patch.object(deepep_v2.DeepEPv2Buffer, "get_buffer", lambda *_, **__: buffer),
        mock.patch.object(deepep_v2._DeepEPv2Impl, "_masked_token_capacity", lambda *_: 128),
    ):
        recorder = ServerRecorder(settings, metadata, SimpleNamespace(records_affinity_now=lambda: True))
        step = TopkStep(settings, metadata, recorder)
        scale = SimpleNamespace(ue8m0=False, tma_aligned=False)
        dispatcher = deepep_v2._DeepEPv2Impl(None, TOP_K, 6, 3, HIDDEN, scale, 16, False)
        for name, (extends, rows, real) in PASSES.items():
            extend[0] = extends
            mode = SimpleNamespace(is_extend=lambda e=extends: e, is_target_verify=lambda: False)
            recorder.on_forward_pass_start(SimpleNamespace(forward_mode=mode, global_num_token_non_padded_cpu=real))
            ids = torch.tensor(rows, dtype=torch.int32).reshape(-1, TOP_K)
            mapped = step(1, ids, torch.tensor(real), info)
            weights = torch.full(ids.shape, 0.5)
            hidden = torch.zeros(len(ids), HIDDEN, dtype=torch.bfloat16)
            dispatched = dispatcher.dispatch(hidden, StandardTopKOutput(weights, ids, torch.zeros(len(ids), 4)))
            again = deepep_v2.DeepEPv2CombineInput(dispatched.hidden_states, None)
            found[name] = {
                "mapped": mapped,
                "sent": buffer.given["topk_idx"].tolist(),
                "waits": buffer.given["do_cpu_sync"],
                "weights": buffer.given["topk_weights"].tolist(),
                "rows back": len(dispatcher.combine(again)),
                "counts": recorder.recorder.counts[:, 1].tolist(),
            }
            recorder.on_forward_pass_end()
    moe = SimpleNamespace(
        expert_distribution_recorder_mode="stat", moe_a2a_backend="deepep_v2", deepep_mode="low_latency"
    )
    with mock.patch.object(expert_distribution, "get_exec", lambda: SimpleNamespace(moe=moe)):
        gatherer = expert_distribution._SelectExpertsSinglePassGatherer
        with mock.patch.object(gatherer, "__init__", lambda *_: None):
            made = expert_distribution._SinglePassGatherer.init_new(metadata, 0)
        found["gatherer"] = type(made).__name__
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
