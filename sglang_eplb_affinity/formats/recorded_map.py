"""The file that a server records its expert map in, and what it says about the map's origin.

The file is SGLang's map format with one more key::

    {"eplb_affinity": {"version": 1, "model": {...}, "topology": {...}, "num_slots": ..., "round": ..., ...},
     "physical_to_logical_map": [layers][slots]}

SGLang as patched by this project reads it; an unpatched SGLang 0.5.17 refuses any key that it does not know, so
``python -m sglang_eplb_affinity convert --to sglang`` writes a plain file for it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sglang_eplb_affinity.dispatch.map_figures import MapFigures
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.topology import Topology

KEY = "eplb_affinity"
VERSION = 1
_OF_ROUNDS = ("promised", "best_map", "best_slots")  # may be missing


@dataclass(frozen=True)
class ServedModel:
    """What a map must fit. ``num_layers`` counts dense layers, as SGLang's maps do; ``path`` is only told, not checked:
    the same model has other paths on other hosts, and a fine-tuned model keeps its experts."""

    path: str
    architecture: str
    num_layers: int
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class MapOrigin:
    """Where a recorded map comes from.

    ``dispatch``: replica choice rule it was planned for. ``written``: date and time, ISO 8601 in UTC.
    ``routing_checksum``, ``routing_tokens``: SHA-256 of the recorded window (counts and token sample) that it was
    planned from, and the window's token-expert assignments in the layer that has most. ``contiguous``, ``recorded``:
    figures of SGLang's start placement and of this map on that window. ``promised``, ``best_map``: by layer, null for
    layers without traffic, what this map and each layer's best one gave on it, under the names of LayerFigures;
    ``best_slots`` [layers][slots]: the best map where it is another one.
    """

    model: ServedModel
    topology: Topology
    num_slots: int
    algorithm: str
    dispatch: str
    round: int
    written: str
    sglang_version: str
    package_version: str
    routing_checksum: str | None = None
    routing_tokens: int = 0
    contiguous: MapFigures | None = None
    recorded: MapFigures | None = None
    map_checksum: str = field(default="")
    promised: dict[str, list[float | None]] | None = None
    best_map: dict[str, list[float | None]] | None = None
    best_slots: list[list[int]] | None = None

    def differences(self, model: ServedModel, topology: Topology, num_slots: int) -> list[str]:
        """What does not fit the server, each as ``NAME is A, but the server has B``; empty if all fits."""
        pairs = [
            ("model architecture", self.model.architecture, model.architecture),
            ("layers", self.model.num_layers, model.num_layers),
            ("experts", self.model.num_experts, model.num_experts),
            ("experts per token", self.model.top_k, model.top_k),
            ("slots", self.num_slots, num_slots),
            ("EP size", self.topology.num_gpus, topology.num_gpus),
            ("nodes", self.topology.num_nodes, topology.num_nodes),
        ]
        return [f"{name} {theirs}, but the server has {ours}" for name, theirs, ours in pairs if theirs != ours]


def map_checksum(expert_map: ExpertMap) -> str:
    """SHA-256 in hex of the slots' experts, int32 little-endian, layer by layer."""
    return hashlib.sha256(expert_map.physical_to_logical.astype("<i4").tobytes()).hexdigest()


def save_recorded_map(path: Path, expert_map: ExpertMap, origin: MapOrigin) -> None:
    """Write atomically; raises InputError if the file cannot be written."""
    write_atomically(path, json.dumps(to_json(expert_map, origin)).encode())


def to_json(expert_map: ExpertMap, origin: MapOrigin) -> dict[str, Any]:
    about = {"version": VERSION, **asdict(origin), "map_checksum": map_checksum(expert_map)}
    # First in the file, so that `head -c 2000` shows it.
    return {KEY: about, **expert_map.to_json()}


def origin_of(data: Any, expert_map: ExpertMap, source: str) -> MapOrigin | None:
    """What the file says about its map; None for a map of another origin.

    Raises InputError if the entry cannot be read, or if the map was changed after it was recorded.
    """
    about = data.get(KEY) if isinstance(data, dict) else None
    if about is None:
        return None
    if not isinstance(about, dict) or about.get("version") != VERSION:
        version = about.get("version") if isinstance(about, dict) else None
        raise InputError(f"{source}: its entry {KEY} is of version {version}, but this package reads {VERSION}")
    try:
        values = {name: about[name] for name in MapOrigin.__dataclass_fields__ if name not in _OF_ROUNDS}
        values |= {name: about.get(name) for name in _OF_ROUNDS}
        values["model"] = ServedModel(**about["model"])
        values["topology"] = Topology(**about["topology"])
        for name in ("contiguous", "recorded"):
            values[name] = None if about[name] is None else MapFigures(**about[name])
        origin = MapOrigin(**values)
    except (KeyError, TypeError, InputError) as error:
        raise InputError(f"{source}: its entry {KEY} is incomplete ({error})") from None
    if origin.map_checksum != map_checksum(expert_map):
        raise InputError(
            f"{source}: physical_to_logical_map is not the map that was recorded (its checksum differs); "
            f"delete the key {KEY} to load it all the same"
        )
    return origin
