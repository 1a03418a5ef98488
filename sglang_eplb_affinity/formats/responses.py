"""Routing in the responses of servers, as a trace: JSON lines, one response each, one sequence for each choice.

- SGLang (``return_routed_experts``): base64 of int32 LOGICAL ids [tokens, layers, k] in ``meta_info.routed_experts``
  (/generate) or ``sglext.routed_experts`` (OpenAI API). All layers of the model, dense ones too; the shape is not in
  the response, so k must be given, and tokens are those of the prompt and of the completion but its last.
- vLLM (``--enable-return-routed-experts``): ``prompt_routed_experts`` of a response and ``routed_experts`` of each
  choice: nested lists [tokens, layers, k], or base64 of an .npy file of that shape. MoE layers only.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.content import array_of, read_bytes
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import MAX_EXPERTS, RoutingTrace, check_distinct


def read_responses(
    path: str | os.PathLike[str], num_experts: int, top_k: int | None = None, dense_layers: int = 0
) -> RoutingTrace:
    """A trace of all responses of a .jsonl file (or its .gz), without the leading dense layers.

    Raises InputError that names the file, the line and what is wrong. ``top_k`` is needed for SGLang's only.
    """
    source = str(path)
    if not 0 < num_experts <= MAX_EXPERTS:
        raise InputError(f"{num_experts} experts; must be 1 to {MAX_EXPERTS}")
    try:
        lines = read_bytes(path, source).decode().splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{source}: not text; expected one response as JSON in each line") from None
    sequences: list[np.ndarray] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            sequences += _of_response(line, f"{source} line {number}", top_k, dense_layers)
    if not sequences:
        raise InputError(f"{source}: no response holds routed_experts; ask the server to return them")
    for ids in sequences:
        if ids.shape[1:] != sequences[0].shape[1:]:
            raise InputError(
                f"{source}: has responses of {ids.shape[1:]} and of {sequences[0].shape[1:]} [layers, k]; "
                "give those of one model"
            )
    lengths = [len(ids) for ids in sequences]
    joined = np.concatenate(sequences)
    if joined.size and not 0 <= joined.min() <= joined.max() < num_experts:
        raise InputError(f"{source}: ids {joined.min()} to {joined.max()}, but ids must be 0 to {num_experts - 1}")
    check_distinct(joined, f"{source}: routed_experts", ("token", "layer"))
    return RoutingTrace(
        joined.astype(np.int16), num_experts, np.repeat(np.arange(len(sequences), dtype=np.int32), lengths),
        source=source,
    )  # fmt: skip


def _of_response(line: str, where: str, top_k: int | None, dense_layers: int) -> list[np.ndarray]:
    try:
        response = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not JSON; expected one response in each line") from None
    if not isinstance(response, dict):
        raise InputError(f"{where}: holds a {type(response).__name__}, but a response is an object")
    meta, extension = response.get("meta_info"), response.get("sglext")
    for entry, usage in ((meta, meta), (extension, response.get("usage"))):
        if isinstance(entry, dict) and entry.get("routed_experts") is not None:
            return [_sglang(entry["routed_experts"], usage, where, top_k, dense_layers)]
    choices = response.get("choices")
    prompt = response.get("prompt_routed_experts")
    start = [] if prompt is None else [_shaped(prompt, where, "prompt_routed_experts")]
    found = []
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict) and choice.get("routed_experts") is not None:
            parts = [*start, _shaped(choice["routed_experts"], where, "routed_experts")]
            if parts[0].shape[1:] != parts[-1].shape[1:]:
                raise InputError(f"{where}: prompt_routed_experts and routed_experts differ in [layers, k]")
            ids = np.concatenate(parts)
            found.append(ids[(ids >= 0).all((1, 2))])  # vLLM marks tokens that were not captured
            start = []  # the prompt is shared by the choices: count it once
    return [ids for ids in found if len(ids)]


def _sglang(value: Any, usage: Any, where: str, top_k: int | None, dense_layers: int) -> np.ndarray:
    if top_k is None:
        raise InputError(f"{where}: SGLang's routed_experts do not say their shape; give --top-k")
    data = _decoded(value, where)
    if len(data) % 4:
        raise InputError(f"{where}: routed_experts has {len(data)} bytes, but must be int32")
    flat = np.frombuffer(data, "<i4")
    numbers = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    counted = [number for number in numbers if type(number) is int]
    if len(counted) != 2:
        raise InputError(f"{where}: has no prompt_tokens and completion_tokens, which tell the shape of routed_experts")
    tokens = sum(counted) - 1  # the last token of the completion is never routed
    if tokens < 1 or top_k < 1 or not flat.size or flat.size % (tokens * top_k):
        raise InputError(
            f"{where}: routed_experts has {flat.size} ids, which do not divide into {tokens} tokens (prompt + "
            f"completion - 1) of top-{top_k}"
        )
    ids = flat.reshape(tokens, -1, top_k)
    if dense_layers >= ids.shape[1]:
        raise InputError(f"{where}: {dense_layers} dense layers, but it has {ids.shape[1]} layers in all")
    return ids[:, dense_layers:]


def _shaped(value: Any, where: str, name: str) -> np.ndarray:
    if isinstance(value, str):
        data = _decoded(value, where)
        if data[:6] != b"\x93NUMPY":
            raise InputError(f"{where}: {name} is neither lists nor base64 of an .npy array")
        try:
            value = np.load(io.BytesIO(data), allow_pickle=False)
        except Exception:  # numpy raises many types on broken arrays
            raise InputError(f"{where}: {name} is a broken .npy array") from None
    ids = array_of(value, where, name)
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise InputError(f"{where}: {name} is {ids.dtype} of shape {ids.shape}, but must be [tokens, layers, k] ids")
    return ids.astype(np.int64)


def _decoded(value: Any, where: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise InputError(f"{where}: routed_experts is not base64") from None
