"""What the series left beside an installed SGLang: originals, patches and checksums, and what was begun.

Before the first file of SGLang changes, the originals and the checksums of what is to come are written (`intent`).
Whatever then interrupts, every file is one of those that are known, and the next apply or unapply goes on from there.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.patching.series import Patch, files_of, read_series
from sglang_eplb_affinity.patching.upstream import Installation

SUFFIX = ".eplb_affinity_patches"
_IN_DIST_INFO = "eplb_affinity_patches"
_GONE = ".gone"


@dataclass(frozen=True)
class State:
    """One folder beside ``sglang/``; outside its ``.dist-info``, which pip would leave behind half empty."""

    installation: Installation

    @property
    def folder(self) -> Path:
        here = self.installation
        beside = here.site / f"sglang-{here.version}{SUFFIX}"
        inside = here.dist_info / _IN_DIST_INFO
        return inside if inside.is_dir() and not beside.is_dir() else beside

    @property
    def interrupted(self) -> bool:
        """Whether an apply or unapply began to change files and did not end."""
        return (self.folder / "intent").is_file()

    @property
    def exists(self) -> bool:
        return self.folder.is_dir()

    @property
    def patches(self) -> list[Patch]:
        """The patches that are in force, as they were when applied; none while that is not certain."""
        return read_series(self.folder) if (self.folder / "series").is_file() and not self.interrupted else []

    @property
    def names(self) -> tuple[str, ...]:
        """Every file that may differ from the wheel's."""
        return tuple(sorted({*_checksums(self.folder / "checksums"), *_checksums(self.folder / "intent")}))

    def expects(self, name: str) -> set[str | None]:
        """Checksums that ``name`` may have: the wheel's, that of the series in force, and that of what was begun."""
        known: set[str | None] = {self.installation.recorded.get(name)}
        for listing in ("checksums", "intent"):
            known |= {value for named, value in _rows(self.folder / listing) if named == name}
        return known

    def is_as_applied(self, name: str) -> bool:
        return self.installation.checksum_of(name) == _checksums(self.folder / "checksums").get(name)

    def original(self, name: str) -> Path:
        """The wheel's version of ``name``: as kept, or as installed."""
        kept = self.folder / "originals" / name
        return kept if kept.is_file() else self.installation.site / name

    def begin(self, targets: dict[str, str | None], originals: dict[str, bytes]) -> None:
        """Write what is needed to go on or back from any point; ``targets`` are checksums by name (None: no file)."""
        self.sweep()
        if self.folder.parent == self.installation.dist_info:
            os.replace(self.folder, self.installation.site / f"sglang-{self.installation.version}{SUFFIX}")
        for name, data in originals.items():
            path = self.folder / "originals" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
        self.folder.mkdir(exist_ok=True)
        # What was begun before this is as possible as what begins now.
        rows = [(name, value) for name, value in _rows(self.folder / "intent") if targets.get(name) != value]
        _write_checksums(self.folder / "intent", [*rows, *targets.items()])

    def finish(self, series: list[Patch]) -> None:
        """The files are in place: remember ``series`` as what is in force."""
        for patch in series:
            write_atomically(self.folder / patch.name, patch.text.encode())
        rows = [(name, self.installation.checksum_of(name)) for name in files_of(series)]
        _write_checksums(self.folder / "checksums", rows)
        write_atomically(self.folder / "series", "".join(f"{patch.name}\n" for patch in series).encode())
        (self.folder / "intent").unlink(missing_ok=True)

    def cancel(self) -> None:
        """No file was changed after all: take back what `begin` wrote."""
        if (self.folder / "series").is_file():
            (self.folder / "intent").unlink(missing_ok=True)
        else:
            self.clear()

    def clear(self) -> None:
        if self.exists:
            gone = self.folder.with_name(self.folder.name + _GONE)
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(self.folder, gone)
        self.sweep()

    def sweep(self) -> None:
        """Remove what an interrupted `clear` left, and what stayed when pip replaced another version of SGLang."""
        here = self.installation
        for folder in here.site.glob(f"sglang-*{SUFFIX}{_GONE}"):
            shutil.rmtree(folder)
        beside = here.site.glob(f"sglang-*{SUFFIX}")
        inside = here.site.glob(f"sglang-*.dist-info/{_IN_DIST_INFO}")
        for folder in [*beside, *inside]:
            if here.dist_info == folder.parent or folder.name == f"sglang-{here.version}{SUFFIX}":
                continue
            for name, value in _rows(folder / "checksums"):
                if name not in here.recorded and value is not None and here.checksum_of(name) == value:
                    (here.site / name).unlink()
            shutil.rmtree(folder)
            if folder.parent != here.site and not any(folder.parent.iterdir()):
                folder.parent.rmdir()


def _rows(path: Path) -> list[tuple[str, str | None]]:
    if not path.is_file():
        return []
    pairs = (line.split(" ", 1) for line in path.read_text().splitlines() if line)
    return [(name, None if value == "-" else value) for value, name in pairs]


def _checksums(path: Path) -> dict[str, str | None]:
    return dict(_rows(path))


def _write_checksums(path: Path, rows: list[tuple[str, str | None]]) -> None:
    write_atomically(path, "".join(f"{value or '-'} {name}\n" for name, value in rows).encode())
