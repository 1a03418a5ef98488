"""This package beside the patched SGLang: by pip, or by uv in an environment that has no pip."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sglang_eplb_affinity.domain.errors import InputError

NAME = "sglang-eplb-affinity"


def installer() -> tuple[list[str], list[str]] | None:
    """What installs into this Python's environment: the command and the options of its verb; None: nothing does."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "--disable-pip-version-check"], []
    uv = shutil.which("uv")
    return ([uv, "pip"], ["--python", sys.executable]) if uv else None


def require_installer() -> tuple[list[str], list[str]]:
    found = installer()
    if found is None:
        raise InputError(
            f"PYTHON={sys.executable}: its environment has no pip, and no uv is on PATH; install either "
            "(`python -m ensurepip`), and nothing was changed"
        )
    return found


def install(checkout: Path, *, editable: bool = False) -> None:
    """Install ``checkout`` without its dependencies, which SGLang brings along; raises InputError if that fails."""
    command, options = require_installer()
    at_hand = ["--no-build-isolation"] if _setuptools() >= 77 else []  # works without a network then
    source = ["-e", str(checkout)] if editable else [str(checkout)]
    _run([*command, "install", "-q", *options, "--no-deps", *at_hand, *source])


def uninstall() -> str:
    """Remove this package; says so if it stays because nothing can remove it."""
    found = installer()
    if found is None:
        return f"{NAME} stays installed: this environment has no pip, and no uv is on PATH"
    command, options = found
    _run([*command, "uninstall", "-q", *options, *([] if options else ["-y"]), NAME])
    return f"removed {NAME}"


def _setuptools() -> int:
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return 0


def _run(command: list[str]) -> None:
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        told = [line for line in lines if re.match(r"(?i)error|×|[×╰]", line)] or lines[-1:] or ["no message"]
        raise InputError(f"`{' '.join(command)}` failed ({told[0]}); SGLang's files were left as they are")
