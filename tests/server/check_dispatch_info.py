"""Which placement each TopK of a model uses. Runs in a Python with patched SGLang; prints one JSON line of findings."""

import json
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn


class Block(nn.Module):
    """An MoE block as models have it; some number their experts only."""

    def __init__(self, topk: nn.Module, layer_id: int) -> None:
        super().__init__()
        self.topk = topk
        self.experts = nn.Module()
        self.experts.layer_id = layer_id


def main() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.eplb import expert_location
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo, resolve_dispatch_info
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.model_executor.model_runner_components import moe_ep_setup

    ids = torch.tensor([[2, 0, 1, 0], [1, 2, 0, 1]])
    table = torch.tensor([[[1, 3], [2, -1], [0, -1]], [[2, -1], [0, 3], [1, -1]]])
    padded = torch.nn.functional.pad(table, (0, 2), value=-1)
    metadata = expert_location.ExpertLocationMetadata(ids, ids, padded, padded, (padded >= 0).sum(-1), 2, None)
    config = SimpleNamespace(
        moe=SimpleNamespace(ep_dispatch_algorithm="dynamic", moe_a2a_backend="none", enable_waterfill=False)
    )
    resources = SimpleNamespace(expert_location_metadata=metadata)
    found: dict[str, object] = {}
    with (
        mock.patch.object(moe_ep_setup, "get_exec", lambda: config),
        mock.patch.object(moe_ep_setup, "get_global_expert_location_metadata", lambda: metadata),
        mock.patch.object(moe_ep_setup, "_eplb_remap_enabled", lambda: True),
        mock.patch("sglang.srt.runtime_context.get_resources", lambda: resources),
    ):
        for name, draft in (("target", False), ("draft", True)):
            model = nn.ModuleList([Block(TopK(2, layer_id=0), 0), Block(TopK(2), 1), Block(TopK(2), 7)])
            moe_ep_setup.prepare_topk_placement(model, is_draft_worker=draft)
            found[name] = [[b.topk.topk_config.placed_layer_id, b.topk.topk_config.is_draft] for b in model]
        with expert_location.draft_expert_order(True):
            inside = expert_location.get_global_expert_location_metadata()
            found["draft slots"] = [inside.logical_to_all_physical(0, expert) for expert in range(3)]
        after = expert_location.get_global_expert_location_metadata()
        found["target slots"] = [after.logical_to_all_physical(0, expert) for expert in range(3)]
        try:
            unnumbered = Block(TopK(2), 0)
            del unnumbered.experts.layer_id
            moe_ep_setup.prepare_topk_placement(nn.ModuleList([unnumbered]), is_draft_worker=False)
        except ValueError as error:
            found["unnumbered"] = str(error)
    info = object()
    with mock.patch.object(ExpertLocationDispatchInfo, "init_new", lambda layer_id: ("looked up", layer_id)):
        found["resolved"] = [
            resolve_dispatch_info(None, placed_layer_id=1, is_draft=False),
            resolve_dispatch_info(info, placed_layer_id=1, is_draft=False) is info,
            resolve_dispatch_info(info, placed_layer_id=1, is_draft=True),
            resolve_dispatch_info(None, placed_layer_id=None, is_draft=False),
        ]
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
