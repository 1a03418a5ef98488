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

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.domain.topology import Topology

MapFormat = Literal["sglang", "vllm-ascend", "tensorrt-llm"]
MAP_FORMATS: tuple[MapFormat, ...] = ("sglang", "vllm-ascend", "tensorrt-llm")


def load_map(path: str | os.PathLike[str], dense_layers: int = 0, num_experts: int | None = None) -> ExpertMap:
    """A map in any of the formats (told by suffix and keys), with rows for the dense layers as SGLang wants them.

    ``dense_layers`` rows are added only to formats that leave them out. Raises InputError that names the file.
    """
    return parse_map(read_data(path), str(path), dense_layers, num_experts)


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


def read_data(path: str | os.PathLike[str], source: str | None = None) -> Any:
    """The content of a .json, .yaml or .pt file, tensors as lists; ``source`` begins error messages."""
    source = source or str(path)
    suffix = Path(path).suffix
    if suffix == ".pt":
        return _read_pt(path, source)
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{source}: not a text file; expected .json, .yaml or .pt") from None
    if suffix in (".yaml", ".yml"):
        try:
            import yaml
        except ImportError:
            raise InputError(f"{source}: reading YAML needs the package pyyaml, which is not installed") from None
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"{source}: not YAML") from None
    try:
        return json.loads(text)
    except ValueError:
        raise InputError(f"{source}: not JSON") from None


def _read_pt(path: str | os.PathLike[str], source: str) -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(f"{source}: reading .pt needs torch, which is not installed") from None
    try:
        data = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror or error})") from None
    except Exception:  # torch raises many types on foreign files
        raise InputError(f"{source}: not a file that torch.load(weights_only=True) can read") from None
    if isinstance(data, dict):
        return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in data.items()}
    return data


def _save_pt(expert_map: ExpertMap, path: Path) -> None:
    try:
        import torch
    except ImportError:
        raise InputError(f"{path}: writing .pt needs torch, which is not installed") from None
    buffer = io.BytesIO()
    ids = torch.from_numpy(expert_map.physical_to_logical.astype(np.int64))
    torch.save({"physical_to_logical_map": ids}, buffer)
    write_atomically(path, buffer.getvalue())


def _rows(source: str, rows: list[Any]) -> np.ndarray:
    try:
        ids = np.asarray(rows)
    except ValueError:
        raise InputError(f"{source}: layers or devices have different numbers of slots") from None
    if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"{source}: expected integer expert ids, the same number of slots in every layer")
    return ids


def _vllm_ascend_rows(source: str, data: dict[str, Any]) -> np.ndarray:
    try:
        layers = sorted(data["layer_list"], key=lambda layer: layer["layer_id"])
        rows = [
            [
                e
                for device in sorted(layer["device_list"], key=lambda d: d["device_id"])
                for e in device["device_expert"]
            ]
            for layer in layers
        ]
    except (KeyError, TypeError) as error:
        raise InputError(f"{source}: layer_list is incomplete ({error})") from None
    if len(rows) != data.get("moe_layer_count", len(rows)):
        raise InputError(f"{source}: moe_layer_count is {data['moe_layer_count']}, but layer_list has {len(rows)}")
    return _rows(source, rows)


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
    if not isinstance(assignments, dict) or not all(isinstance(key, int) for key in assignments):
        raise InputError(f"{source}: initial_global_assignments must map layer numbers to lists of expert ids")
    layers = sorted(assignments)
    expected = list(range(layers[0], layers[0] + len(layers))) if layers else []
    if layers != expected or (layers and layers[0] not in (0, dense_layers)):
        raise InputError(
            f"{source}: layers are numbered {layers[:3]}..., but must follow each other from {dense_layers}; "
            "give the number of leading dense layers"
        )
    rows = _rows(source, [assignments[layer] for layer in layers])
    if rows.shape[1] != data.get("num_slots", rows.shape[1]):
        raise InputError(f"{source}: num_slots is {data['num_slots']}, but layers list {rows.shape[1]} ids")
    return rows


def _to_tensorrt(moe: np.ndarray, first_layer: int, layer_updates_per_iter: int) -> str:
    lines = [f"num_slots: {moe.shape[1]}", "initial_global_assignments:"]
    lines += [f"  {first_layer + i}: [{', '.join(map(str, row))}]" for i, row in enumerate(moe.tolist())]
    return "\n".join([*lines, f"layer_updates_per_iter: {layer_updates_per_iter}", ""])
