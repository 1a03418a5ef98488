"""The replica choice that affinity takes unless it is told one: the same for servers and for the simulator."""

from __future__ import annotations

from typing import Literal

from sglang_eplb_affinity.dispatch.rules import DispatchRule

# DeepEP's two modes, ``auto`` (prefill in normal mode, decode in low latency), and ``v2``, DeepEP V2.
DispatchMode = Literal["normal", "low_latency", "auto", "v2"]


def affinity_rule(mode: DispatchMode | None, num_nodes: int, prefill_only: bool) -> DispatchRule:
    """``cover_balanced`` where a token is sent once per destination and fewer destinations save time; ``primary`` where
    decode sends a copy to every expert, within a node; else ``static``.

    ``num_nodes``: of the planned topology. ``prefill_only``: there are no decode passes. ``mode`` None: another
    all-to-all backend, or none. Over several nodes ``primary`` forgoes replicas on the own node (docs/design.md).
    DeepEP V2 sends once per destination in decode too, but within a node its decode gains
    nothing by fewer, and pays for every active slot (docs/capacity_planning.md).
    """
    pays = mode == "normal" or (mode == "v2" and num_nodes > 1) or (mode in ("v2", "auto") and prefill_only)
    if pays:
        return "cover_balanced"
    return "primary" if mode in ("low_latency", "auto") and num_nodes == 1 else "static"
