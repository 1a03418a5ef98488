"""The patch files: reading, applying to a folder, and writing them deterministically."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sglang_eplb_affinity.domain.errors import InputError

_TARGET = re.compile(r"^(?:---|\+\+\+) (?:[ab]/)?(\S+)", re.M)
HEADER_FIELDS = ("What:", "Why:", "Origin:", "Drop:")


@dataclass(frozen=True)
class Patch:
    """One topic: a header (what, why, origin, when it can be dropped), then a unified diff."""

    name: str
    header: str
    diff: str

    @property
    def files(self) -> tuple[str, ...]:
        """Files that the diff touches, relative to site-packages."""
        return tuple(sorted({name for name in _TARGET.findall(self.diff) if name != "/dev/null"}))

    @property
    def text(self) -> str:
        return self.header + self.diff


def read_series(folder: Path) -> list[Patch]:
    """Every patch that ``folder/series`` names, in its order."""
    listing = folder / "series"
    if not listing.is_file():
        raise InputError(f"{listing}: not found; run from a checkout of this project")
    names = [line.split("#", 1)[0].strip() for line in listing.read_text().splitlines()]
    return [_read_patch(folder / name) for name in names if name]


def _read_patch(path: Path) -> Patch:
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(f"{path}: named in the series, but cannot be read ({error.strerror})") from None
    start = re.search(r"^--- ", text, re.M)
    header = text[: start.start()] if start else text
    missing = [field for field in HEADER_FIELDS if not re.search(rf"^{field}", header, re.M)]
    if missing:
        raise InputError(f"{path}: header lacks {', '.join(missing)}")
    return Patch(path.name, header, text[start.start() :] if start else "")


def files_of(series: list[Patch]) -> tuple[str, ...]:
    return tuple(sorted({name for patch in series for name in patch.files}))


def apply_in(folder: Path, patch: Patch, *, reverse: bool = False, offset: bool = False) -> None:
    """Apply one patch to the files below ``folder``: every hunk with its exact context, and at its exact line.

    ``offset`` lets hunks move to other lines, for rewriting patches after an earlier one grew.

    Raises InputError naming the patch otherwise; ``folder`` may then hold a part, so it must be a scratch copy.
    """
    if not patch.diff:
        return
    command = ["git", "apply", "--verbose", "--unsafe-paths", "--whitespace=nowarn", *(["-R"] if reverse else []), "-"]
    # A folder inside somebody's repository must not make git resolve paths against that repository.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent), "GIT_DIR": os.devnull, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, input=patch.diff, text=True, capture_output=True)
    except FileNotFoundError:
        raise InputError("git: not found on PATH; it is needed to apply the patch series") from None
    if done.returncode or ("offset" in done.stderr and not offset):
        reasons = [
            line.removeprefix("error: ") for line in done.stderr.splitlines() if "error:" in line or "offset" in line
        ]
        raise InputError(f"{patch.name}: does not apply ({'; '.join(reasons) or done.stderr.strip()})")


def make_diff(before: dict[str, str | None], after: dict[str, str | None]) -> str:
    """Unified diff of files by name (None: not there), without dates or hashes, so that it is reproducible."""
    out: list[str] = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        lines = difflib.unified_diff(
            (old or "").splitlines(keepends=True),
            (new or "").splitlines(keepends=True),
            "/dev/null" if old is None else f"a/{name}",
            "/dev/null" if new is None else f"b/{name}",
        )
        for line in lines:
            if not line.endswith("\n"):
                line += "\n\\ No newline at end of file\n"
            out.append(line)
    return "".join(out)
