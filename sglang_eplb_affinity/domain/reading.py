"""The bytes and lines of a file, bounded in size and unpacked where it is gzip.

A path may also be ``-`` (standard input) or JSON itself, as SGLang's ``--init-expert-location`` takes it.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from typing import IO

from sglang_eplb_affinity.domain.errors import InputError

MAX_BYTES = 4 << 30
"""Largest content that is read, after unpacking."""
MAX_TEXT = 1 << 28
"""Largest text that is parsed as a whole; Python's lists take up to 20 times as much."""
_ARCHIVES = (b"PK", b"\x1f\x8b")


def name_of(path: str | os.PathLike[str]) -> str:
    """How messages call what is read: its path, ``standard input`` or ``inline JSON``."""
    text = str(path)
    return "standard input" if text == "-" else "inline JSON" if _is_inline(text) else text


def text_of(data: bytes, refusal: str) -> str:
    """UTF-8, or UTF-16 with a byte order mark as Windows shells write it; raises InputError(refusal)."""
    wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(refusal) from None


def _is_inline(path: str) -> bool:
    return path.lstrip().startswith("{")


@lru_cache(maxsize=1)
def _all_of(stream: IO[bytes]) -> bytes:
    """Kept, since a stream gives its bytes once and some commands look at an input twice."""
    return _bounded(stream)


def _bounded(stream: IO[bytes]) -> bytes:
    """At most one byte more than may be: of text MAX_TEXT, of archives MAX_BYTES."""
    start = stream.read(MAX_TEXT + 1)
    return start + stream.read(MAX_BYTES + 1 - len(start)) if start[:2] in _ARCHIVES else start


def read_bytes(path: str | os.PathLike[str], source: str) -> bytes:
    """The bytes of a file, unpacked if it is gzip; raises InputError if they are more than may be."""
    if _is_inline(str(path)):
        return str(path).encode()
    data = _all_of(sys.stdin.buffer) if str(path) == "-" else _of_file(path, source)
    if data[:2] == b"\x1f\x8b":
        try:
            with gzip.open(io.BytesIO(data)) as packed:
                data = _bounded(io.BufferedReader(packed))
        except (OSError, EOFError, zlib.error):
            raise InputError(f"{source}: a broken gzip file") from None
    if len(data) > MAX_BYTES:
        raise InputError(f"{source}: larger than {MAX_BYTES >> 30} GiB")
    if len(data) > MAX_TEXT and data[:2] not in _ARCHIVES:
        raise InputError(f"{source}: more than {MAX_TEXT >> 20} MiB of text; write so much as .pt or .npz")
    return data


def lines_of(path: str | os.PathLike[str], source: str) -> Iterator[str]:
    """Lines of a text file or of its .gz, read one by one; each at most MAX_TEXT characters."""
    try:
        with ExitStack() as opened:
            stream = _opened(path, source, opened)
            if stream.peek(2)[:2] == b"\x1f\x8b":
                stream = io.BufferedReader(opened.enter_context(gzip.GzipFile(fileobj=stream)))
            wide = stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            text = opened.enter_context(io.TextIOWrapper(stream, "utf-16" if wide else "utf-8-sig", newline="\n"))
            read = 0
            while line := text.readline(MAX_TEXT + 1):
                read += len(line)
                if len(line) > MAX_TEXT or read > MAX_BYTES:
                    raise InputError(
                        f"{source}: larger than {MAX_BYTES >> 30} GiB, or a line than {MAX_TEXT >> 20} MiB"
                    )
                yield line
    except UnicodeError:
        raise InputError(f"{source}: not text; expected one response as JSON in each line") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{source}: a broken gzip file") from None
    except OSError as error:
        raise InputError(f"{source}: cannot be read ({error.strerror or error})") from None


def _opened(path: str | os.PathLike[str], source: str, opened: ExitStack) -> io.BufferedReader:
    if str(path) == "-" and isinstance(sys.stdin.buffer, io.BufferedReader):
        return sys.stdin.buffer
    if str(path) == "-" or _is_inline(str(path)):
        return io.BufferedReader(io.BytesIO(read_bytes(path, source)))
    if os.path.isdir(path):
        raise InputError(f"{source}: is a folder, but must be a file")
    return opened.enter_context(open(path, "rb"))


def _of_file(path: str | os.PathLike[str], source: str) -> bytes:
    try:
        if os.path.isdir(path):
            raise InputError(f"{source}: is a folder, but must be a file")
        with open(path, "rb") as file:
            return _bounded(file)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
