"""Where a figure comes from: hardware, versions, commit, date."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.harness.engine import ROOT
from bench.harness.process import scrub

_WHERE = ("--results-dir", "--out", "--hold")  # options that name folders and files of this machine
_PACKAGES = ("sglang", "sglang-eplb-affinity", "torch", "transformers", "numpy", "deep-ep", "sgl-kernel")


def now() -> str:
    """UTC, to the second, ISO 8601."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@lru_cache(maxsize=1)
def provenance() -> dict[str, Any]:
    """What every record of the store carries: hardware, versions, commit, patches."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    given = os.environ.get("SOURCE_COMMIT")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ":!results")
    return {
        "hardware": hardware(),
        "versions": versions(),
        # A copy on a GPU host has no .git, or an old one: whoever copied it says what it is.
        "commit": given or commit or "unknown",
        "uncommitted_changes": bool(changed) and not given,
        "patches_sha256": patches_digest(ROOT / "patches"),
    }


def describe_environment(command: Sequence[str]) -> dict[str, Any]:
    """The content of a run's environment.json."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": now(),
        "command": " ".join(command),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_average_at_start": [round(x, 2) for x in os.getloadavg()],
        **provenance(),
    }


def hardware() -> str:
    """One line: the GPUs (if any) and the CPU cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    cpu = f"{cores} cores of {_cpu_model()}"
    listed = _output("nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader")
    return ", ".join([*_counted_gpus(listed, os.environ.get("CUDA_VISIBLE_DEVICES")), cpu])


def _counted_gpus(listed: str, visible: str | None) -> list[str]:
    """``2 x NAME`` for each kind of GPU among the lines ``index, uuid, name``.

    Where ``visible`` (CUDA_VISIBLE_DEVICES) leaves some out, as when a host is shared, the line says so.
    """
    gpus = [line.split(", ", 2) for line in listed.splitlines() if line.count(", ") >= 2]
    wanted = None if visible is None else [part.strip() for part in visible.split(",")]
    seen = [name for index, uuid, name in gpus if wanted is None or index in wanted or uuid in wanted]
    left_out = f" (of {len(gpus)} in the host)" if len(seen) < len(gpus) else ""
    return [f"{seen.count(name)} x {name}{left_out}" for name in sorted(set(seen))]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def patches_digest(folder: Path) -> str | None:
    """sha256 over the names and contents of the patch series; None where there is none."""
    files = sorted(path for path in folder.glob("**/*") if path.is_file()) if folder.is_dir() else []
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def command_line(module: str = "bench", arguments: Sequence[str] | None = None) -> list[str]:
    """The command that was given, without this machine's folders: where results went is left out."""
    given = iter(sys.argv[1:] if arguments is None else arguments)
    kept: list[str] = []
    for argument in given:
        if argument in _WHERE:
            next(given, None)
        elif argument.split("=", 1)[0] not in _WHERE:
            kept.append(scrub(argument))
    return ["python", "-m", module, *kept]


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
