"""What the plugin does to DeepEP's dispatcher in SGLang 0.5.17 (layers/moe/token_dispatcher/deepep.py).

The wait is launched on the stream right after dispatch (combine) has been waited for, so that experts (the next layer)
start that much later. Each GPU waits for what it sends to other nodes; the next collective call makes the others wait
for the slowest. Sending and receiving at the same time are taken not to slow each other down.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from bench.engines.emulated_link.copies import combine_bytes, dispatch_bytes
from bench.engines.emulated_link.settings import LinkSettings

logger = logging.getLogger(__name__)

_MODULE = "sglang.srt.layers.moe.token_dispatcher.deepep"
MAX_NODES = 31  # nodes that a token visits are bits of an int32


class EmulatedLink:
    """Of one dispatcher (there is one a layer and mode)."""

    def __init__(self, settings: LinkSettings, impl: Any, per_expert: bool) -> None:
        ranks, rank = impl.group.size(), impl.group.rank()
        gpus_per_node = settings.gpus_per_node(ranks)
        self.slots_per_node = impl.num_local_experts * gpus_per_node
        self.own_node = rank // gpus_per_node
        self.per_expert = per_expert
        sizes = impl.hidden_size, impl.router_topk
        to_picoseconds = 1000 / settings.gb_per_s  # bytes / (1e9 bytes/s) = nanoseconds
        self.dispatch_picoseconds = round(dispatch_bytes(*sizes, bool(impl.use_fp8), per_expert) * to_picoseconds)
        self.combine_picoseconds = round(combine_bytes(*sizes, per_expert) * to_picoseconds)
        self.count = torch.zeros(1, dtype=torch.int64, device="cuda")

    def after_dispatch(self, ids: torch.Tensor) -> None:
        from bench.engines.emulated_link.kernel import after_dispatch

        after_dispatch(
            ids, self.count, self.slots_per_node, self.own_node, self.dispatch_picoseconds, self.per_expert
        )  # fmt: skip

    def after_combine(self) -> None:
        from bench.engines.emulated_link.kernel import after_combine

        after_combine(self.count, self.combine_picoseconds)


def load() -> None:
    """Register the hooks. SGLang logs what a plugin raises and goes on without it, so bench looks for the log line."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    settings = LinkSettings.of(os.environ)
    if settings.nodes > MAX_NODES:
        raise ValueError(f"emulated link: at most {MAX_NODES} nodes, not {settings.nodes}")
    for name, per_expert in (("_DeepEPDispatcherImplNormal", False), ("_DeepEPDispatcherImplLowLatency", True)):
        HookRegistry.register(f"{_MODULE}.{name}.dispatch_b", dispatch_hook(settings, per_expert), HookType.AROUND)
        HookRegistry.register(f"{_MODULE}.{name}.combine_b", combine_hook, HookType.AROUND)


def dispatch_hook(settings: LinkSettings, per_expert: bool) -> Callable[..., Any]:
    """Around ``dispatch_b(self, hidden_states, topk_ids, ...)``; the ids are those of this GPU's own tokens."""

    def around(original: Callable[..., Any], impl: Any, *arguments: Any) -> Any:
        link = getattr(impl, "emulated_link", None)
        if link is None:
            link = impl.emulated_link = EmulatedLink(settings, impl, per_expert)
            _announce(settings, link, per_expert)
        output = original(impl, *arguments)
        link.after_dispatch(arguments[1])
        return output

    return around


def combine_hook(original: Callable[..., Any], impl: Any, *arguments: Any) -> Any:
    """Around ``combine_b(self, ...)``: as many copies come back as went out."""
    output = original(impl, *arguments)
    impl.emulated_link.after_combine()
    return output


_announced: set[bool] = set()


def _announce(settings: LinkSettings, link: EmulatedLink, per_expert: bool) -> None:
    if per_expert in _announced:
        return
    _announced.add(per_expert)
    logger.warning(
        "[emulated link] every dispatch and combine waits for its remote bytes at %g GB/s between %d nodes "
        "(%s, %.1f and %.1f ns a copy): times are not this machine's",
        settings.gb_per_s,
        settings.nodes,
        "low latency" if per_expert else "normal mode",
        link.dispatch_picoseconds / 1000,
        link.combine_picoseconds / 1000,
    )
