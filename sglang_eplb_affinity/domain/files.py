"""Writing files so that a reader never sees a part. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

from sglang_eplb_affinity.domain.errors import InputError


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` by a temporary file and a rename; raises InputError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        temporary.unlink(missing_ok=True)
