"""Routing in the responses of servers, as a trace: JSON lines, one response each, one sequence for each choice.

- SGLang (``return_routed_experts``): base64 of int32 LOGICAL ids [tokens, layers, k] in ``meta_info.routed_experts``
  (/generate; a batch is a list of such responses) or ``sglext.routed_experts`` (OpenAI API). The shape is not in the
  response, so k must be given, and tokens are those of the prompt and of the completion but its last.
- vLLM (``--enable-return-routed-experts``): ``routed_experts`` of each choice, base64 of an .npy file
  [tokens, layers, k] of LOGICAL ids, prompt included, or nested lists of that shape; some releases have the prompt's
  in ``prompt_routed_experts`` of the response.

Both have a row for every layer of the model; dense layers hold zeros, which ``dense_layers`` drops.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.content import array_of, read_npy
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.reading import lines_of, name_of
from sglang_eplb_affinity.domain.routing import MAX_EXPERTS, RoutingTrace, check_distinct


def read_responses(
    path: str | os.PathLike[str], num_experts: int, top_k: int | None = None, dense_layers: int = 0
) -> RoutingTrace:
    """A trace of all responses of a .jsonl file (or its .gz), without the leading dense layers.

    Raises InputError that names the file, the line and what is wrong. ``top_k`` is needed for SGLang's only.
    """
    source = name_of(path)
    if not 0 < num_experts <= MAX_EXPERTS:
        raise InputError(f"{num_experts} experts; must be 1 to {MAX_EXPERTS}")
    sequences: list[np.ndarray] = []
    for number, line in enumerate(lines_of(path, source), 1):
        if line.strip():
            where = f"{source} line {number}"
            sequences += [_checked(ids, num_experts, where) for ids in _of_line(line, where, top_k)]
            if sequences and sequences[-1].shape[1:] != sequences[0].shape[1:]:
                raise InputError(
                    f"{where}: has {sequences[-1].shape[1:]} [layers, k], but the first response has "
                    f"{sequences[0].shape[1:]}; give whole responses of one model"
                )
    if not sequences:
        raise InputError(f"{source}: no response holds routed_experts; ask the server to return them")
    lengths = [len(ids) for ids in sequences]
    joined = _without_dense(np.concatenate(sequences), dense_layers, source)
    check_distinct(joined, f"{source}: routed_experts", ("token", "layer"))
    return RoutingTrace(
        joined, num_experts, np.repeat(np.arange(len(sequences), dtype=np.int32), lengths), source=source
    )


def _checked(ids: np.ndarray, num_experts: int, where: str) -> np.ndarray:
    if ids.size and not 0 <= ids.min() <= ids.max() < num_experts:
        raise InputError(f"{where}: ids {ids.min()} to {ids.max()}, but ids must be 0 to {num_experts - 1}")
    return ids.astype(np.int16)


def _without_dense(ids: np.ndarray, dense_layers: int, source: str) -> np.ndarray:
    """``ids`` int16 [tokens, layers, k] without the rows of leading dense layers, which hold zeros."""
    used = np.flatnonzero(ids.any((0, 2)))
    zeros = int(used[0]) if len(used) else ids.shape[1]
    if not dense_layers and (ids.shape[2] == 1 or not zeros):
        return ids
    if not dense_layers:
        raise InputError(
            f"{source}: its first {zeros} layers hold expert 0 only, as dense layers do (--dense-layers {zeros})"
        )
    if dense_layers >= ids.shape[1]:
        raise InputError(f"{source}: {dense_layers} dense layers, but it has {ids.shape[1]} layers in all")
    if zeros < dense_layers:
        raise InputError(
            f"{source}: {dense_layers} dense layers, but layer {zeros} holds experts; give the number of leading dense "
            "layers (--dense-layers)"
        )
    return ids[:, dense_layers:]


def _of_line(line: str, where: str, top_k: int | None) -> list[np.ndarray]:
    """The sequences of one response, or of a list of responses."""
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not JSON; expected one response in each line") from None
    found = []
    for response in read if isinstance(read, list) else [read]:
        if not isinstance(response, dict):
            raise InputError(f"{where}: holds a {type(response).__name__}, but a response is an object")
        found += _of_response(response, where, top_k)
    return [ids for ids in found if len(ids)]


def _of_response(response: dict[str, Any], where: str, top_k: int | None) -> list[np.ndarray]:
    meta, extension, usage = (response.get(name) for name in ("meta_info", "sglext", "usage"))
    for entry, counted in ((meta, meta), (extension, usage)):
        if isinstance(entry, dict) and entry.get("routed_experts") is not None:
            return [_sglang(entry["routed_experts"], counted, where, top_k)]
    choices = response.get("choices")
    prompt = response.get("prompt_routed_experts")
    start = [] if prompt is None else [_shaped(prompt, where, "prompt_routed_experts")]
    shared = usage.get("prompt_tokens") if isinstance(usage, dict) and prompt is None else None
    found: list[np.ndarray] = []
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict) and choice.get("routed_experts") is not None:
            parts = [*start, _shaped(choice["routed_experts"], where, "routed_experts")]
            if parts[0].shape[1:] != parts[-1].shape[1:]:
                raise InputError(f"{where}: prompt_routed_experts and routed_experts differ in [layers, k]")
            ids = np.concatenate(parts)
            if found and type(shared) is int and 0 < shared < len(ids):  # choices share the prompt: count it once
                ids = ids[shared:]
            found.append(ids[(ids >= 0).all((1, 2))])  # some releases mark tokens that were not captured
            start = []
    return found


def _sglang(value: Any, usage: Any, where: str, top_k: int | None) -> np.ndarray:
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
            f"completion - 1) of top-{top_k}; ask for whole sequences (routed_experts_start_len 0)"
        )
    return flat.reshape(tokens, -1, top_k)


def _shaped(value: Any, where: str, name: str) -> np.ndarray:
    if isinstance(value, str):
        data = _decoded(value, where)
        if data[:6] != b"\x93NUMPY":
            raise InputError(f"{where}: {name} is neither lists nor base64 of an .npy array")
        try:
            value = read_npy(io.BytesIO(data), len(data), where, name)
        except InputError:
            raise
        except Exception:  # numpy raises many types on broken arrays
            raise InputError(f"{where}: {name} is a broken .npy array") from None
    ids = array_of(value, where, name)
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise InputError(f"{where}: {name} is {ids.dtype} of shape {ids.shape}, but must be [tokens, layers, k] ids")
    return ids


def _decoded(value: Any, where: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise InputError(f"{where}: routed_experts is not base64") from None
