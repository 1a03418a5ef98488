"""Reading a file's content, whatever it is: bounded in memory, unpacked where it is gzip, told by its first bytes.

Every reader of this package starts here, so that a broken file of any kind is one line that names it.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError, missing_package
from sglang_eplb_affinity.domain.reading import MAX_BYTES, name_of, read_bytes, text_of

MAX_ELEMENTS = 1 << 28
"""Largest array that is made of lists, or of a tensor that claims more elements than its file holds."""
_PACKED_RATIO = 1100
"""Deflate packs at most 1032 to 1: a member that claims more is not what its header says."""


def read_content(path: str | os.PathLike[str], source: str | None = None) -> Any:
    """The content of a .pt, .npz, .json or .yaml file, or of its .gz; tensors and arrays as they are.

    ``source`` begins error messages. Raises InputError if the file cannot be read or claims more than it can hold.
    """
    source = source or name_of(path)
    data = read_bytes(path, source)
    if data[:4] == b"PK\x03\x04":
        return _parse_zip(data, source)
    if data[:6] == b"\x93NUMPY":
        raise InputError(f"{source}: holds one bare array (.npy); expected an .npz trace, .pt, .json or .yaml")
    if not data.strip():
        raise InputError(f"{source}: is empty")
    text = text_of(data, f"{source}: neither text nor a file that torch.save or numpy.savez wrote")
    name = Path(path).name.removesuffix(".gz")
    if name.endswith((".yaml", ".yml")) or (str(path) == "-" and not text.lstrip().startswith(("{", "["))):
        return parse_yaml(text, source)
    return parse_json(text, source)


def parse_json(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        more = "; responses, one in each line, become a trace by `convert --to trace`"
        raise InputError(f"{source}: not JSON{more if error.msg == 'Extra data' else ''}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{source}: not JSON") from None


def parse_yaml(text: str, source: str) -> Any:
    """YAML without aliases: a few lines of them can stand for any amount of memory."""
    try:
        import yaml
    except ImportError:
        raise missing_package(source, "PyYAML", "simulate") from None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, loader)):
            raise InputError(f"{source}: has YAML aliases (*name); write the lists out")
        return yaml.load(text, loader)  # the loader is a safe one
    except InputError:
        raise
    except Exception:  # PyYAML's constructors raise many types on odd values
        raise InputError(f"{source}: not YAML") from None


def array_of(value: Any, source: str, name: str) -> np.ndarray:
    """A numpy array of a tensor, an array or nested lists of numbers; bfloat16 as float32."""
    if hasattr(value, "untyped_storage"):
        return _of_tensor(value, source, name)
    if isinstance(value, np.ndarray):
        array = value
    elif isinstance(value, list):
        array = _of_lists(value, source, name)
    else:
        raise InputError(f"{source}: {name} is missing or neither a tensor nor lists of numbers")
    if array.dtype.kind not in "iuf":
        raise InputError(f"{source}: {name} holds {array.dtype}, but must hold numbers")
    return array


def _of_lists(value: list[Any], source: str, name: str) -> np.ndarray:
    claimed, inner = len(value), value
    while inner and isinstance(inner[0], list):
        inner = inner[0]
        claimed *= len(inner)
    if claimed > MAX_ELEMENTS:
        raise InputError(f"{source}: {name} has {claimed} elements; at most {MAX_ELEMENTS} are read")
    try:
        return np.asarray(value)
    except (ValueError, OverflowError):
        raise InputError(f"{source}: {name} has rows of different length, or values that are not numbers") from None


def _of_tensor(value: Any, source: str, name: str) -> np.ndarray:
    try:
        held = value.untyped_storage().nbytes() // max(value.element_size(), 1)
        if value.numel() > max(held, MAX_ELEMENTS >> 6):
            raise InputError(f"{source}: {name} claims {value.numel()} elements, but the file holds {held}")
        value = value.detach().cpu()
        if str(value.dtype) in ("torch.bfloat16", "torch.float16"):
            value = value.float()
        array = np.asarray(value.numpy())
    except InputError:
        raise
    except Exception:  # sparse, quantized, meta and other tensors that numpy has no name for
        raise InputError(f"{source}: {name} is a tensor of a kind that is not read") from None
    if array.dtype.kind not in "iuf":
        raise InputError(f"{source}: {name} holds {array.dtype}, but must hold numbers")
    return array


def _parse_zip(data: bytes, source: str) -> Any:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            for member in members:
                if member.file_size > _PACKED_RATIO * (member.compress_size + 64):
                    raise InputError(f"{source}: {member.filename} claims {member.file_size} bytes, more than it holds")
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise InputError(f"{source}: unpacks to more than {MAX_BYTES >> 30} GiB")
            if not any(member.filename.endswith("data.pkl") for member in members):
                return {member.filename.removesuffix(".npy"): _npy(archive, member, source) for member in members}
    except InputError:
        raise
    except Exception:  # zipfile, zlib and numpy raise many types on broken archives
        raise InputError(f"{source}: not a readable .npz file, nor one that torch.save wrote") from None
    return _torch_load(data, source)


def _npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, source: str) -> np.ndarray:
    with archive.open(member) as file:
        return read_npy(file, member.file_size, source, member.filename.removesuffix(".npy"))


def read_npy(file: IO[bytes], size: int, source: str, name: str) -> np.ndarray:
    """One array in .npy format; what it claims is compared with its ``size`` before anything is allocated.

    Raises InputError for that and for arrays of objects, numpy's own errors for a broken header.
    """
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = read(file)
    claimed = dtype.itemsize
    for length in shape:
        claimed *= length
    if dtype.hasobject or any(length < 0 for length in shape):
        raise InputError(f"{source}: {name} is {dtype} of shape {shape}, but must be a plain array")
    if claimed > size:
        raise InputError(f"{source}: {name} claims shape {shape}, but holds {size} bytes")
    return np.frombuffer(file.read(claimed), dtype).reshape(shape, order="F" if fortran else "C")


def _torch_load(data: bytes, source: str) -> Any:
    try:
        import torch
    except ImportError:
        raise missing_package(source, "PyTorch", "dumps") from None
    try:
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception:  # torch raises many types on foreign files
        raise InputError(f"{source}: not a file that torch.load(weights_only=True) can read") from None
