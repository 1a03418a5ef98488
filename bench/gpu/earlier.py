"""Blocks of several sittings add up, as long as everything that could make them differ is the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_eplb_affinity.domain.errors import InputError


def earlier(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The result of earlier sittings at ``path``, or nothing where there is none.

    ``identity``: entries that this sitting's result has too. Raises InputError, naming the entry, where one differs.
    """
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"--out: {path} is not a result of this comparison ({error}); give another folder") from None
    for key, value in identity.items():
        if found.get(key) != json.loads(json.dumps(value)):
            raise InputError(f"--out: {path} has another {key} than this sitting; give another folder")
    return found
