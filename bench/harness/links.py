"""The link between nodes that a run is measured on: the machine's own, or one that is slowed down (emulated)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.engines.emulated_link import settings
from bench.harness.engine import ROOT
from bench.harness.profile import Profile, ServerConfig
from sglang_eplb_affinity.domain.errors import InputError

ACTIVE = "[emulated link] every dispatch and combine waits"  # the plugin's log line; without it a row is void
NVLINK, LOCAL = "nvlink", "cpu"
_EMULATED = re.compile(r"emulated(\d+)")
_PLUGIN = ROOT / "bench" / "engines" / "emulated_link" / "plugin"


@dataclass(frozen=True)
class Link:
    """``gb_per_s`` 0: nothing is emulated."""

    name: str
    gb_per_s: int = 0

    @staticmethod
    def of(profile: Profile) -> Link:
        """Raises InputError for a name that is neither empty nor `emulatedN`."""
        if profile.link in ("", NVLINK, LOCAL):
            return Link(LOCAL if profile.server.engine == "cpu" else NVLINK)
        match = _EMULATED.fullmatch(profile.link)
        if match is None or not int(match[1]):
            raise InputError(f"--link: {profile.link!r} is unknown; use {NVLINK}, or emulatedN for N GB/s")
        return Link(profile.link, int(match[1]))

    @property
    def emulated(self) -> bool:
        return self.gb_per_s > 0

    @property
    def kind(self) -> str:
        return "emulated" if self.emulated else "measured"

    @property
    def title(self) -> str:
        """For tables and plots; empty where nothing is emulated."""
        return f"emulated link, {self.gb_per_s} GB/s a GPU between nodes" if self.emulated else ""


def with_link(profile: Profile, name: str) -> Profile:
    """This profile on that link. With an emulated one each GPU is a node, unless the profile says otherwise."""
    changed = replace(profile, link=name)
    link = Link.of(changed)
    if not link.emulated:
        return replace(changed, link="")
    if "deepep" not in profile.server.flags:
        raise InputError(f"--link {name}: profile {profile.name!r} does not serve with --moe-a2a-backend deepep")
    nodes = profile.server.nodes if profile.server.nodes > 1 else profile.server.emulated_nodes or profile.server.ranks
    server = replace(profile.server, nodes=nodes)
    return replace(changed, server=server, title=f"{profile.title}; {link.title}")


def link_environment(link: str, server: ServerConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """What a server's environment needs for the plugin that emulates the link; empty without one."""
    match = _EMULATED.fullmatch(link)
    if match is None:
        return {}
    path = os.pathsep.join(filter(None, [str(_PLUGIN), str(ROOT), environment.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, **settings.to_environment(float(match[1]), server.nodes)}
