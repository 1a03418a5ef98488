"""`trial`: which hunks of a series would apply to another SGLang, which fail and where; changes nothing."""

from __future__ import annotations

import re
import subprocess
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.patching.hunks import Outcome, hunks_of, try_hunk
from sglang_eplb_affinity.patching.package import require_installer
from sglang_eplb_affinity.patching.series import Patch, files_of, read_series
from sglang_eplb_affinity.patching.upstream import series_versions

_VERSION = re.compile(r"\d+(\.\d+)*([a-z.+-]\w*)*")


def trial(patches: Path, wheel: str, series_version: str | None = None) -> str:
    """A table of every hunk of the series (default: of the nearest version) on ``wheel``, a file or a version."""
    with tempfile.TemporaryDirectory(prefix="eplb-affinity-") as folder:
        path = Path(wheel) if wheel.endswith(".whl") else _download(wheel, Path(folder))
        version = _version_of(path)
        chosen = series_version or nearest(series_versions(patches), version)
        if chosen not in series_versions(patches):
            raise InputError(f"--series {chosen}: there are series for {', '.join(series_versions(patches))}")
        series = read_series(patches / chosen)
        texts = _read_wheel(path, files_of(series))
    rows = try_series(series, texts)
    return _table(rows, f"Series for {chosen} on SGLang {version}")


def nearest(versions: list[str], wanted: str) -> str:
    """The version with the smallest step to ``wanted``; of two the newer."""

    def place(version: str) -> int:
        parts = [int(part) for part in re.findall(r"\d+", version)[:3]]
        return sum(part * 1000 ** (2 - index) for index, part in enumerate(parts))

    if not versions:
        raise InputError("patches: there is no series to try")
    return min(versions, key=lambda version: (abs(place(version) - place(wanted)), -place(version)))


def try_series(series: list[Patch], texts: dict[str, list[str] | None]) -> list[tuple[str, str, int, Outcome]]:
    """Patch, file, line in the patch and outcome of every hunk; a hunk sees what the ones before it changed."""
    state = dict(texts)
    rows = []
    for patch in series:
        shifts: dict[str, int] = {}
        for hunk in hunks_of(patch.diff):
            shift = shifts.get(hunk.file, 0)
            state[hunk.file], outcome, after = try_hunk(hunk, state.get(hunk.file), shift)
            shifts[hunk.file] = after
            rows.append((patch.name, hunk.file, hunk.line, outcome))
    return rows


def _table(rows: list[tuple[str, str, int, Outcome]], title: str) -> str:
    counts = Counter(outcome.result for *_, outcome in rows)
    order = ("applies", "moved", "already there", "fails")
    total = ", ".join(f"{counts[result]} {result}" for result in order)
    lines = [
        f"{title}: {len(rows)} hunks: {total}",
        "",
        "| patch | file | line | result | where |",
        "|---|---|---|---|---|",
    ]
    for patch, file, line, outcome in rows:
        short = file.removeprefix("sglang/srt/")
        lines.append(f"| {patch.removesuffix('.patch')} | {short} | {line} | {outcome.result} | {outcome.where} |")
    return "\n".join(lines)


def _version_of(wheel: Path) -> str:
    parts = wheel.name.split("-")
    if parts[0] != "sglang" or len(parts) < 5:
        raise InputError(f"{wheel}: not named like a wheel of SGLang (sglang-VERSION-...-any.whl)")
    return parts[1]


def _read_wheel(wheel: Path, names: tuple[str, ...]) -> dict[str, list[str] | None]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            known = set(archive.namelist())
            return {name: archive.read(name).decode().splitlines() if name in known else None for name in names}
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel}: cannot be read as a wheel ({getattr(error, 'strerror', None) or error})") from None


def _download(version: str, folder: Path) -> Path:
    if not _VERSION.fullmatch(version):
        raise InputError(f"trial {version}: expected a wheel's file or a version such as 0.5.24")
    command, options = require_installer()
    if options:
        raise InputError(f"trial {version}: uv downloads no wheels; name the file of one")
    # Pip of another Python or platform would do as well: the files that are patched are the same in every wheel.
    done = subprocess.run(
        [*command, "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder), f"sglang=={version}"],
        text=True,
        capture_output=True,
    )
    found = sorted(folder.glob("sglang-*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no wheel came"]
        raise InputError(f"trial {version}: pip could not download it ({lines[-1].strip()})")
    return found[0]
