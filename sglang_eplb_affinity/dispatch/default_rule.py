"""The replica choice that affinity takes unless it is told one: the same for servers and for the simulator."""

from __future__ import annotations

from typing import Literal

from sglang_eplb_affinity.dispatch.rules import DispatchRule

# DeepEP's two modes, ``auto`` (prefill in normal mode, decode in low latency), and ``v2``, DeepEP V2.
DispatchMode = Literal["normal", "low_latency", "auto", "v2"]


def affinity_rule(
    mode: DispatchMode | None, num_nodes: int, phase: Literal["prefill", "decode"] | None
) -> DispatchRule:
    """``cover_balanced`` where a token is sent once per destination and fewer destinations save time; ``primary`` where
    decode sends a copy to every expert, within a node, and where passes of both kinds come; else ``static``.

    ``num_nodes``: of the planned topology. ``phase``: that there is no other. ``mode`` None: another all-to-all
    backend, or none. Over several nodes one slot an expert forgoes replicas on the own node (docs/design.md), so there
    ``primary`` is meant without small passes (:func:`primary_tokens`): ``static`` in decode, ``cover_balanced`` in
    prefill. DeepEP V2 sends once per destination in decode too, but within a node its decode gains nothing by fewer,
    and pays for every active slot (docs/capacity_planning.md).
    """
    prefill_only = phase == "prefill"
    pays = mode == "normal" or (mode == "v2" and num_nodes > 1) or (mode in ("v2", "auto") and prefill_only)
    if pays:
        return "cover_balanced"
    both = mode == "auto" and phase is None
    return "primary" if both or (mode in ("low_latency", "auto") and num_nodes == 1) else "static"


def primary_tokens(num_nodes: int) -> int | None:
    """The size of small passes where ``primary`` was not asked for; None: :func:`small_passes.most_tokens`."""
    return None if num_nodes == 1 else 0
