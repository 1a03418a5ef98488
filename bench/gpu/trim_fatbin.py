"""`python -m bench.gpu.trim_fatbin IN OUT --arch 90`: a library without the device code of other GPUs.

Their code is overwritten with zeros in place, so that offsets stay and the file packs small; the library loads on
GPUs of the named architecture only.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Sequence
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, ELF = 1, 2


def trim(library: bytearray, arch: int) -> tuple[int, int]:
    """Zero in place; returns the bytes (kept, zeroed). A fat binary is a container of (kind, architecture) entries."""
    at = kept = zeroed = 0
    while (at := library.find(MAGIC, at)) >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", library, at)
        if version != 1 or header != 16 or at + header + size > len(library):
            at += len(MAGIC)
            continue
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, start, length = struct.unpack_from("<HHIQ", library, entry)
            (entry_arch,) = struct.unpack_from("<I", library, entry + 28)
            if kind not in (PTX, ELF):
                break
            if kind == ELF and entry_arch == arch:
                kept += length
            else:
                library[entry + start : entry + start + length] = bytes(length)
                zeroed += length
            entry += start + length
        at = end
    return kept, zeroed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.trim_fatbin", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--arch", type=int, default=90)
    options = parser.parse_args(arguments)
    library = bytearray(options.source.read_bytes())
    kept, zeroed = trim(library, options.arch)
    if not kept:
        parser.error(f"{options.source}: no device code for sm_{options.arch}")
    options.target.write_bytes(library)
    print(f"{options.target}: {kept >> 20} MiB of device code kept, {zeroed >> 20} MiB zeroed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
