"""Expert maps in other systems' formats: SGLang (.json, .pt), vllm-ascend (.json), TensorRT-LLM (.yaml).

Layers: SGLang's map has a row for every layer of a DeepSeek model, its leading dense layers too, while vllm-ascend and
TensorRT-LLM name MoE layers only (TensorRT-LLM by their number in the model). ``dense_layers`` is the number of leading
dense layers: that many rows are dropped on the way out of SGLang's format, and filled with SGLang's trivial placement
on the way in.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sglang_eplb_affinity.domain.content import read_content
from sglang_eplb_affinity.domain.errors import InputError, missing_package
from sglang_eplb_affinity.domain.expert_map import ExpertMap, map_rows
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.reading import name_of
from sglang_eplb_affinity.domain.topology import Topology

MapFormat = Literal["sglang", "vllm-ascend", "tensorrt-llm"]
MAX_REPLICAS = 1 << 28
"""Most elements of the table of replicas, layers x experts x replicas, that a file may ask for."""
MAP_FORMATS: tuple[MapFormat, ...] = ("sglang", "vllm-ascend", "tensorrt-llm")


def load_map(
    path: str | os.PathLike[str],
    dense_layers: int = 0,
    num_experts: int | None = None,
    num_gpus: int | None = None,
) -> ExpertMap:
    """A map in any of the formats (told by suffix and keys), with rows for the dense layers as SGLang wants them.

    ``dense_layers`` rows are added only to formats that leave them out. ``num_gpus``: refuse a map that says that it
    is for another number, or whose slots do not divide over it. Raises InputError that names the file.
    """
    data = read_content(path)
    if num_gpus is not None:
        check_devices(data, num_gpus, name_of(path))
    found = parse_map(data, name_of(path), dense_layers, num_experts)
    most = int(found.replica_counts().max(initial=0))
    if found.num_layers * found.num_experts * most > MAX_REPLICAS:
        raise InputError(f"{name_of(path)}: has up to {most} replicas of an expert in a layer, too many to be a map")
    if num_gpus is not None:
        check_slots(found, num_gpus, name_of(path))
    return found


def check_slots(expert_map: ExpertMap, num_gpus: int, source: str) -> None:
    """Refuse a map of ``source`` whose slots are not as many on each of ``num_gpus`` GPUs."""
    slots = expert_map.num_slots
    if slots % num_gpus:
        raise InputError(f"{source}: has {slots} slots, which do not divide evenly over {num_gpus} GPUs")


def parse_map(data: Any, source: str, dense_layers: int = 0, num_experts: int | None = None) -> ExpertMap:
    """What :func:`load_map` does, on the file's content; ``source`` begins error messages."""
    if isinstance(data, dict) and "physical_to_logical_map" in data:
        return ExpertMap.from_json(data, num_experts, source=source)
    if isinstance(data, dict) and "layer_list" in data:
        rows = _vllm_ascend_rows(source, data)
    elif isinstance(data, dict) and "initial_global_assignments" in data:
        rows = _tensorrt_rows(source, data, dense_layers)
    else:
        raise InputError(
            f"{source}: not an expert map; expected the key physical_to_logical_map (SGLang), layer_list (vllm-ascend) "
            "or initial_global_assignments (TensorRT-LLM)"
        )
    experts = int(rows.max(initial=0)) + 1 if num_experts is None else num_experts
    try:
        moe = ExpertMap(rows, experts)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    dense = ExpertMap.contiguous(dense_layers, experts, moe.num_slots).physical_to_logical
    return ExpertMap(np.concatenate([dense.reshape(dense_layers, moe.num_slots), moe.physical_to_logical]), experts)


def save_map(
    expert_map: ExpertMap,
    path: str | os.PathLike[str],
    target: MapFormat,
    topology: Topology | None = None,
    dense_layers: int = 0,
    layer_updates_per_iter: int = 0,
) -> None:
    """Write ``expert_map`` (with rows for dense layers) atomically; vllm-ascend needs the topology."""
    path = Path(path)
    if dense_layers >= expert_map.num_layers:
        raise InputError(f"{dense_layers} dense layers, but the map has only {expert_map.num_layers} layers in all")
    moe = expert_map.physical_to_logical[dense_layers:]
    if target == "sglang":
        if path.suffix == ".pt":
            _save_pt(expert_map, path)
        else:
            expert_map.save(path)
    elif target == "vllm-ascend":
        if topology is None:
            raise InputError("vllm-ascend maps list the experts of each device: give the number of GPUs")
        write_atomically(path, json.dumps(_to_vllm_ascend(moe, topology)).encode())
    else:
        write_atomically(path, _to_tensorrt(moe, dense_layers, layer_updates_per_iter).encode())


def num_devices(data: Any) -> int | None:
    """GPUs that a vllm-ascend map is for; None for the other formats, which do not say."""
    try:
        return len(data["layer_list"][0]["device_list"])
    except (KeyError, IndexError, TypeError):
        return None


def check_devices(data: Any, num_gpus: int, source: str) -> None:
    """Raise InputError if the map says for how many GPUs it is, and these are not ``num_gpus``."""
    devices = num_devices(data)
    if devices is not None and devices != num_gpus:
        raise InputError(f"{source}: is a map for {devices} GPUs (devices), not for {num_gpus}")


def _save_pt(expert_map: ExpertMap, path: Path) -> None:
    try:
        import torch
    except ImportError:
        raise missing_package(str(path), "PyTorch", "dumps") from None
    buffer = io.BytesIO()
    ids = torch.from_numpy(expert_map.physical_to_logical.astype(np.int64))
    torch.save({"physical_to_logical_map": ids}, buffer)
    write_atomically(path, buffer.getvalue())


def _vllm_ascend_rows(source: str, data: dict[str, Any]) -> np.ndarray:
    layers = _by_number(data["layer_list"], "layer_id", f"{source}: layer_list")
    if "moe_layer_count" in data and data["moe_layer_count"] != len(layers):
        raise InputError(f"{source}: moe_layer_count is {data['moe_layer_count']}, but layer_list has {len(layers)}")
    rows: list[list[Any]] = []
    first: tuple[int, int, int, int] | None = None  # layer, its devices, its first device and the slots of that
    for layer, entry in layers:
        devices = _by_number(entry.get("device_list"), "device_id", f"{source}: layer {layer} device_list")
        if entry.get("device_count", len(devices)) != len(devices):
            raise InputError(
                f"{source}: layer {layer} has device_count {entry['device_count']}, but lists {len(devices)} devices"
            )
        row: list[Any] = []
        for device, held in devices:
            experts = held.get("device_expert")
            if not isinstance(experts, list):
                raise InputError(f"{source}: layer {layer} device {device} has no list device_expert")
            first = first or (layer, len(devices), device, len(experts))
            if len(experts) != first[3]:
                raise InputError(
                    f"{source}: layer {layer} device {device} holds {len(experts)} experts, but layer {first[0]} "
                    f"device {first[2]} holds {first[3]}; every device must hold the same number"
                )
            row += experts
        if first is not None and len(devices) != first[1]:
            raise InputError(f"{source}: layer {layer} has {len(devices)} devices, but layer {first[0]} has {first[1]}")
        rows.append(row)
    return map_rows(rows, source, "layer_list")


def _by_number(entries: Any, key: str, where: str) -> list[tuple[int, dict[str, Any]]]:
    """Entries in the order of their number ``key``, which no two share."""
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where} is not a list of entries with {key}")
    found: dict[int, dict[str, Any]] = {}
    for entry in entries:
        number = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(number, int) or isinstance(number, bool):
            raise InputError(f"{where} has an entry whose {key} is {str(number)[:40]}, but must be a number")
        if number in found:
            raise InputError(f"{where} has {key} {number} twice")
        found[number] = entry
    return sorted(found.items())


def _to_vllm_ascend(moe: np.ndarray, topology: Topology) -> dict[str, Any]:
    topology.slots_per_gpu(moe.shape[1])
    return {
        "moe_layer_count": len(moe),
        "layer_list": [
            {
                "layer_id": layer,
                "device_count": topology.num_gpus,
                "device_list": [
                    {"device_id": device, "device_expert": ids}
                    for device, ids in enumerate(row.reshape(topology.num_gpus, -1).tolist())
                ],
            }
            for layer, row in enumerate(moe)
        ],
    }


def _tensorrt_rows(source: str, data: dict[str, Any], dense_layers: int) -> np.ndarray:
    assignments = data["initial_global_assignments"]
    if not isinstance(assignments, dict) or not all(type(key) is int for key in assignments):
        raise InputError(f"{source}: initial_global_assignments must map layer numbers to lists of expert ids")
    layers = sorted(assignments)
    expected = list(range(layers[0], layers[0] + len(layers))) if layers else []
    if layers != expected or (layers and layers[0] not in (0, dense_layers)):
        raise InputError(
            f"{source}: layers are numbered {', '.join(map(str, layers[:3]))}..., but must follow each other from "
            f"{dense_layers}; give the number of leading dense layers (--dense-layers)"
        )
    for layer in layers:
        row, first = assignments[layer], assignments[layers[0]]
        if not isinstance(row, list) or not isinstance(first, list) or len(row) != len(first):
            held = [len(r) if isinstance(r, list) else "no list of" for r in (row, first)]
            raise InputError(f"{source}: layer {layer} has {held[0]} slots, but layer {layers[0]} has {held[1]}")
    rows = map_rows([assignments[layer] for layer in layers], source, "initial_global_assignments")
    if rows.shape[1] != data.get("num_slots", rows.shape[1]):
        raise InputError(f"{source}: num_slots is {data['num_slots']}, but layers list {rows.shape[1]} ids")
    return rows


def _to_tensorrt(moe: np.ndarray, first_layer: int, layer_updates_per_iter: int) -> str:
    lines = [f"num_slots: {moe.shape[1]}", "initial_global_assignments:"]
    lines += [f"  {first_layer + i}: [{', '.join(map(str, row))}]" for i, row in enumerate(moe.tolist())]
    return "\n".join([*lines, f"layer_updates_per_iter: {layer_updates_per_iter}", ""])
