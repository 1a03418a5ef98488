"""--init-expert-location: a map of any format, or a dump to plan from; read and checked before the model loads."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from sglang_eplb_affinity.domain.content import read_content
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingWindow
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.dumps import is_dump, window_of
from sglang_eplb_affinity.formats.maps import num_devices, parse_map
from sglang_eplb_affinity.formats.recorded_map import KEY, MapOrigin, ServedModel, origin_of
from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape
from sglang_eplb_affinity.sglang_hooks.server_arguments import INITIAL_MAP
from sglang_eplb_affinity.sglang_hooks.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """What the server needs a map to fit."""

    model: ServedModel
    shape: MoeShape
    topology: Topology
    num_slots: int


def placement_of(settings: Settings) -> Placement:
    """What a map must fit on this server; raises InputError for a model without routed experts."""
    shape = settings.shape
    if shape is None:
        raise InputError(f"{INITIAL_MAP}: {settings.model_path} has no routed experts; leave the flag out")
    model = ServedModel(settings.model_path, settings.architecture, shape.num_layers, shape.num_experts, shape.top_k)
    return Placement(model, shape, settings.topology, shape.num_experts + settings.redundant)


@dataclass(frozen=True)
class InitialMap:
    """Either ``expert_map`` (a row for each layer, dense ones too) or ``window`` (of a dump, to plan from)."""

    source: str
    expert_map: ExpertMap | None = None
    window: RoutingWindow | None = None
    origin: MapOrigin | None = None


def read_initial_map(value: str, server: Placement) -> InitialMap:
    """Read the flag's value: a .json, .pt or .yaml file, or inline JSON.

    Raises InputError, one line that names the flag's value and what differs, unless it fits the model and the server.
    """
    flag = f"{INITIAL_MAP} {_short(value)}"
    data = _read(value, flag)
    if is_dump(data):
        return InitialMap(_short(value), window=_window(data, server, flag))
    origin = _check_origin(data, server, flag)
    devices = num_devices(data)
    if devices is not None and devices != server.topology.num_gpus:
        raise InputError(f"{flag}: is for EP size {devices}, but the server has {server.topology.num_gpus}")
    if isinstance(data, dict) and "physical_to_logical_map" in data:
        expert_map = ExpertMap.from_json(data, server.shape.num_experts, source=flag)
        needed, kind = server.shape.num_layers, "layers"
    else:
        dense = min(server.shape.moe_layers, default=0)
        rows = parse_map(data, flag, dense, server.shape.num_experts).physical_to_logical[dense:]
        expert_map = ExpertMap(rows, server.shape.num_experts)
        needed, kind = len(server.shape.moe_layers), "MoE layers"
    if (expert_map.num_layers, expert_map.num_slots) != (needed, server.num_slots):
        raise InputError(
            f"{flag}: has {expert_map.num_layers} {kind} of {expert_map.num_slots} slots, but the model needs "
            f"{needed} {kind} of {server.num_slots} (experts + --ep-num-redundant-experts)"
        )
    if kind == "MoE layers":
        expert_map = _with_dense_layers(expert_map, server.shape)
    return InitialMap(_short(value), expert_map, origin=origin)


def warn_of_rule(loaded: InitialMap, settings: Settings) -> None:
    """A map is worth what was recorded only under the replica choice that it was planned for."""
    if loaded.origin is None or loaded.origin.dispatch == settings.rule or not settings.redundant:
        return
    logger.warning(
        "[eplb-affinity] %s %s: was planned for --ep-dispatch-algorithm %s, but this server chooses replicas by %s; "
        "give --ep-dispatch-algorithm %s",
        INITIAL_MAP, loaded.source, loaded.origin.dispatch, settings.served_rule, loaded.origin.dispatch,
    )  # fmt: skip


def _short(value: str) -> str:
    return value if len(value) < 200 else value[:40] + "..."


def _check_origin(data: Any, server: Placement, flag: str) -> MapOrigin | None:
    """A recorded map tells more than shapes: it must be for this model, EP size and number of nodes."""
    if not isinstance(data, dict) or KEY not in data or "physical_to_logical_map" not in data:
        return None
    origin = origin_of(data, ExpertMap.from_json(data, source=flag), flag)
    if origin is not None:
        differences = origin.differences(server.model, server.topology, server.num_slots)
        if differences:
            raise InputError(f"{flag}: was recorded for {'; '.join(differences)}")
    return origin


def _with_dense_layers(moe: ExpertMap, shape: MoeShape) -> ExpertMap:
    """Rows for the layers without routed experts as well, which hold SGLang's start placement."""
    ids = ExpertMap.contiguous(shape.num_layers, shape.num_experts, moe.num_slots).physical_to_logical.copy()
    ids[list(shape.moe_layers)] = moe.physical_to_logical
    return ExpertMap(ids, shape.num_experts)


def _window(data: dict[str, Any], server: Placement, flag: str) -> RoutingWindow:
    shape = server.shape
    window = window_of(data, flag)
    if window.counts.shape != (shape.num_layers, shape.num_experts):
        raise InputError(
            f"{flag}: has {window.num_layers} layers of {window.num_experts} experts, but the model needs "
            f"{shape.num_layers} layers of {shape.num_experts} experts; is it another model's dump?"
        )
    return window


def _read(value: str, flag: str) -> Any:
    if value.removesuffix(".gz").endswith((".json", ".yaml", ".yml", ".pt")):
        return read_content(value, flag)
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InputError(f"{flag}: not a .json, .pt or .yaml file, nor inline JSON") from None
