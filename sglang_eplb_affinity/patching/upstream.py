"""The pinned SGLangs: what `patches/VERSION/UPSTREAM` says, and what is installed."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sglang_eplb_affinity.domain.errors import InputError


@dataclass(frozen=True)
class Upstream:
    """`patches/VERSION/UPSTREAM`: ``version: X`` and one ``wheel: NAME sha256: HEX`` line for each wheel."""

    version: str
    wheels: tuple[tuple[str, str], ...]

    @staticmethod
    def read(path: Path) -> Upstream:
        version, wheels = "", []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            words = line.split("#", 1)[0].split()
            if not words:
                continue
            if words[0] == "version:" and len(words) == 2:
                version = words[1]
            elif words[0] == "wheel:" and len(words) == 4 and words[2] == "sha256:":
                wheels.append((words[1], words[3]))
            else:
                raise InputError(f"{path}:{number}: expected 'version: X' or 'wheel: NAME sha256: HEX', found {line!r}")
        if not version:
            raise InputError(f"{path}: has no 'version:' line")
        return Upstream(version, tuple(wheels))


def series_folder(patches: Path, version: str) -> Path:
    """The folder of the series for SGLang ``version``: ``patches/version``, or ``patches`` if it is a series itself.

    Raises InputError naming the versions that there are.
    """
    if (patches / "series").is_file():
        return patches
    folder = patches / version
    if not (folder / "series").is_file():
        known = series_versions(patches)
        raise InputError(
            f"SGLang {version}: this project has series for {' and '.join(known) or 'none'}; "
            f"install {' or '.join(f'sglang=={name}' for name in known) or 'another checkout'}"
        )
    return folder


def series_versions(patches: Path) -> list[str]:
    """Versions of SGLang that ``patches`` has a series for, the oldest first."""
    names = [path.parent.name for path in patches.glob("*/series")]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")])


def checksum(data: bytes) -> str:
    """A file's checksum as a wheel's RECORD writes it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


@dataclass(frozen=True)
class Installation:
    """An installed SGLang: ``site`` holds ``sglang/`` and its ``.dist-info``."""

    site: Path
    dist_info: Path
    version: str

    @staticmethod
    def find() -> Installation:
        """The SGLang that this Python would import; raises InputError if there is none."""
        found = [Path(str(getattr(each, "_path", ""))) for each in importlib.metadata.distributions(name="sglang")]
        if not found:
            raise InputError(
                "PYTHON: has no SGLang installed; run `make setup`, or name the Python that has it: "
                "`make apply PYTHON=/path/to/python`"
            )
        # A folder without RECORD may be what pip left of an earlier version: the first with one is what is imported.
        dist_info = next((path for path in found if (path / "RECORD").is_file()), found[0])
        if not (dist_info / "RECORD").is_file():
            raise InputError(
                f"{dist_info}: has no RECORD, so SGLang was not installed from a wheel; "
                "install a wheel that patches/*/UPSTREAM names"
            )
        return Installation(dist_info.parent, dist_info, dist_info.name.removesuffix(".dist-info").split("-", 1)[1])

    def require(self, upstream: Upstream) -> None:
        if self.version != upstream.version:
            raise InputError(
                f"{self.site / 'sglang'}: is SGLang {self.version}, but the series is for {upstream.version}; "
                f"install sglang=={upstream.version}"
            )

    @cached_property
    def recorded(self) -> dict[str, str]:
        """Checksum of every file of the wheel, by path relative to ``site``."""
        with (self.dist_info / "RECORD").open(newline="") as file:
            return {row[0]: row[1] for row in csv.reader(file) if len(row) >= 2}

    def checksum_of(self, name: str) -> str | None:
        """Checksum of a file as it is now, None if it is not there."""
        path = self.site / name
        return checksum(path.read_bytes()) if path.is_file() else None
