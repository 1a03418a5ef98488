"""How bench tells a server's processes which link to emulate: two environment variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sglang_eplb_affinity.domain.errors import InputError

BANDWIDTH = "EPLB_BENCH_LINK_GB_PER_S"
NODES = "EPLB_BENCH_LINK_NODES"


@dataclass(frozen=True)
class LinkSettings:
    """``gb_per_s``: what a GPU can send to other nodes, in 1e9 bytes/s. ``nodes``: the ranks are dealt out to them in
    order, evenly."""

    gb_per_s: float
    nodes: int

    @staticmethod
    def of(environment: Mapping[str, str]) -> LinkSettings:
        try:
            found = LinkSettings(float(environment[BANDWIDTH]), int(environment[NODES]))
        except (KeyError, ValueError):
            raise InputError(f"emulated link: {BANDWIDTH} and {NODES} must both be numbers") from None
        if not found.gb_per_s > 0 or found.nodes < 2:
            raise InputError(
                f"emulated link: {BANDWIDTH}={found.gb_per_s:g} must be above 0 and {NODES}={found.nodes} at least 2"
            )
        return found

    def gpus_per_node(self, ranks: int) -> int:
        if ranks % self.nodes:
            raise InputError(f"emulated link: {ranks} expert-parallel ranks do not divide over {self.nodes} nodes")
        return ranks // self.nodes


def to_environment(gb_per_s: float, nodes: int) -> dict[str, str]:
    return {BANDWIDTH: f"{gb_per_s:g}", NODES: str(nodes)}
