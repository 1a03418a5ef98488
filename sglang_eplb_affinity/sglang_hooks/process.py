"""What this process has of the package: made when a rank starts, read by the hooks ever after."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_eplb_affinity.device.forced_routing import ForcedRouting
    from sglang_eplb_affinity.rebalance.round_record import RoundObserver
    from sglang_eplb_affinity.sglang_hooks.loaded_map import LoadedMap
    from sglang_eplb_affinity.sglang_hooks.settings import Settings
    from sglang_eplb_affinity.sglang_hooks.topk_step import TopkStep

topk_step: TopkStep | None = None
"""Replica choice and recording at every layer; None if both are SGLang's."""

forced_routing: ForcedRouting | None = None
"""Read at every layer, so None must cost nothing."""

observers: list[RoundObserver] = []
"""Told on rank 0 after every round."""

last_round: dict[str, Any] | None = None
"""On rank 0, the record of the last round with the keys of its log line."""

loaded_map: LoadedMap | None = None
"""Set on rank 0 once a map is loaded."""


@cache
def settings() -> Settings:
    """Of this process's server, once SGLang has published its arguments."""
    # Not at the top: it needs numba, which servers that do not use this package's flags need not load.
    from sglang_eplb_affinity.sglang_hooks.adapter import adapter
    from sglang_eplb_affinity.sglang_hooks.settings import Settings

    return Settings.of(adapter().arguments())
