"""What `make apply | unapply | verify | refresh | status` do. Everything is computed in a scratch folder first."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.patching.series import Patch, apply_in, files_of, make_diff, read_series
from sglang_eplb_affinity.patching.upstream import Installation, Upstream, checksum


@dataclass(frozen=True)
class Project:
    """The series for the SGLang that is installed (its folder in the checkout), and that SGLang."""

    patches: Path
    installation: Installation

    @property
    def upstream(self) -> Upstream:
        return Upstream.read(self.patches / "UPSTREAM")

    @property
    def series(self) -> list[Patch]:
        return read_series(self.patches)

    @property
    def applied(self) -> list[Patch]:
        """The patches that are in force now, as they were when applied."""
        state = self.installation.state_dir
        return read_series(state) if (state / "series").is_file() else []


def apply(project: Project) -> str:
    installation = project.installation
    installation.require(project.upstream)
    series, applied = project.series, project.applied
    with _pristine(project, files_of(applied) + files_of(series)) as scratch:
        if applied and [patch.text for patch in applied] == [patch.text for patch in series]:
            return f"already applied: {len(series)} patches on {installation.site / 'sglang'}"
        for patch in series:
            apply_in(scratch, patch)
        _install(project, scratch, {*files_of(applied), *files_of(series)}, series)
    return f"applied {len(series)} patches to {len(files_of(series))} files of {installation.site / 'sglang'}"


def unapply(project: Project) -> str:
    applied = project.applied
    if not applied:
        changed = _changed_by_others(project, set(files_of(project.series)))
        if changed:
            _require_nobody_else(changed)
        return f"not applied: {project.installation.site / 'sglang'} is as the wheel installed it"
    with _pristine(project, files_of(applied)) as scratch:
        _install(project, scratch, set(files_of(applied)), [])
    return f"took back {len(applied)} patches; {len(files_of(applied))} files match the wheel's checksums again"


def verify(project: Project) -> str:
    """Prove both directions in a scratch folder, and what is installed against them."""
    project.installation.require(project.upstream)
    series = project.series
    names = files_of(series)
    with _pristine(project, files_of(project.applied) + names) as scratch:
        before = {name: _read(scratch / name) for name in names}
        for patch in series:
            apply_in(scratch, patch)
        for patch in reversed(series):
            apply_in(scratch, patch, reverse=True)
        for name in names:
            if _read(scratch / name) != before[name]:
                raise InputError(f"{name}: taking the series back does not give the wheel's file")
    state = "applied" if project.applied else "not applied"
    return (
        f"verified: {len(series)} patches apply without fuzz or offset and come off again to {len(names)} files "
        f"whose checksums equal the wheel's RECORD (now: {state})"
    )


def refresh(project: Project, topic: str | None = None, wheel: Path | None = None) -> str:
    """Write the series again. Edits made to the installed files since apply go into ``topic`` (default: the last).

    ``wheel`` is needed when a file was edited that the series did not touch before: its original comes from there.
    """
    project.installation.require(project.upstream)
    series = project.series
    target = topic or (series[-1].name if series else "")
    if target not in [patch.name for patch in series]:
        raise InputError(f"TOPIC={topic}: not in the series; known: {', '.join(p.name for p in series)}")
    if [patch.text for patch in project.applied] != [patch.text for patch in series]:
        raise InputError("patches: the series in force is not this checkout's; run `make apply` before `make refresh`")
    names = _watched(project, series)
    with _pristine(project, names, edits=True, wheel=wheel) as scratch:
        keep = {n: (scratch / n).read_bytes() for n in names if (scratch / n).is_file()}
        rewritten, position = [], [patch.name for patch in series].index(target)
        for index, patch in enumerate(series):
            before = {name: _read(scratch / name) for name in names}
            apply_in(scratch, patch, offset=True)
            if index == position:
                _merge_edits(project, scratch, names, series, position)
            after = {name: _read(scratch / name) for name in names}
            rewritten.append(Patch(patch.name, patch.header, make_diff(before, after)))
    changed = [new.name for new, old in zip(rewritten, series, strict=True) if new.text != old.text]
    for patch in rewritten:
        if patch.name in changed:
            write_atomically(project.patches / patch.name, patch.text.encode())
    touched = files_of(rewritten)
    _write_state(project.installation, rewritten, {name: data for name, data in keep.items() if name in touched})
    return f"refreshed {len(rewritten)} patches; changed: {', '.join(changed) or 'none'}"


def status(project: Project) -> str:
    installation, series, applied = project.installation, project.series, project.applied
    lines = [
        f"SGLang {installation.version} in {installation.site / 'sglang'} (series is for {project.upstream.version})"
    ]
    same = [patch.text for patch in applied] == [patch.text for patch in series]
    lines.append("series: " + ("not applied" if not applied else "applied" if same else "another version is applied"))
    for patch in series:
        lines.append(f"  {patch.name}: {', '.join(patch.files)}")
    changed = _changed_by_others(project, {*files_of(series), *files_of(applied)})
    lines.append("changed by someone else: " + (", ".join(changed) or "none"))
    return "\n".join(lines)


def _read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _changed_by_others(project: Project, names: set[str]) -> list[str]:
    expected = _expected_checksums(project.installation)
    recorded = project.installation.recorded
    return [n for n in sorted(names) if project.installation.checksum_of(n) != expected.get(n, recorded.get(n))]


def _expected_checksums(installation: Installation) -> dict[str, str | None]:
    """Checksums of the patched files as apply left them."""
    path = installation.state_dir / "checksums"
    if not path.is_file():
        return {}
    rows = (line.split(" ", 1) for line in path.read_text().splitlines() if line)
    return {name: None if value == "-" else value for value, name in rows}


def _watched(project: Project, series: list[Patch]) -> tuple[str, ...]:
    """Files of the series, and any other .py file of SGLang that differs from RECORD (edits to be refreshed in)."""
    installation, names = project.installation, set(files_of(series))
    for path in (installation.site / "sglang").rglob("*.py"):
        name = path.relative_to(installation.site).as_posix()
        if installation.checksum_of(name) != installation.recorded.get(name):
            names.add(name)
    return tuple(sorted(names))


@contextmanager
def _pristine(
    project: Project, names: tuple[str, ...], *, edits: bool = False, wheel: Path | None = None
) -> Iterator[Path]:
    """A scratch folder with the wheel's version of ``names``: as installed, as kept by apply, or from ``wheel``."""
    installation, applied = project.installation, project.applied
    if not edits:
        changed = _changed_by_others(project, set(names))
        if changed:
            _require_nobody_else(changed)
    with tempfile.TemporaryDirectory(prefix="eplb-affinity-") as name:
        scratch = Path(name)
        originals = installation.state_dir / "originals"
        for file in dict.fromkeys(names):
            source = originals / file if (originals / file).is_file() else installation.site / file
            (scratch / file).parent.mkdir(parents=True, exist_ok=True)
            recorded = installation.recorded.get(file)
            if recorded is None and file in files_of(applied):
                continue  # a file that the series adds
            if source.is_file() and (recorded is not None or not edits):
                shutil.copy(source, scratch / file)
            if recorded is not None and wheel is not None and _checksum_or_none(scratch / file) != recorded:
                with zipfile.ZipFile(wheel) as archive:
                    (scratch / file).write_bytes(archive.read(file))
            if _checksum_or_none(scratch / file) != recorded:
                _require_nobody_else([file])
        yield scratch


def _require_nobody_else(changed: list[str]) -> None:
    raise InputError(
        f"{', '.join(changed)}: changed by someone else (checksum of neither the wheel's RECORD nor this series); "
        "reinstall SGLang, or take that change back, and try again"
    )


def _checksum_or_none(path: Path) -> str | None:
    return checksum(path.read_bytes()) if path.is_file() else None


def _merge_edits(project: Project, scratch: Path, names: tuple[str, ...], series: list[Patch], position: int) -> None:
    """Bring edits of the installed files into ``scratch``, which holds the series up to ``position``."""
    with tempfile.TemporaryDirectory(prefix="eplb-affinity-") as folder:
        full = Path(folder)
        for name in names:
            if (scratch / name).is_file():
                (full / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(scratch / name, full / name)
        for patch in series[position + 1 :]:
            apply_in(full, patch, offset=True)
        expected = {name: _read(full / name) for name in names}
    installed = {name: _read(project.installation.site / name) for name in names}
    edits = Patch(f"(edits for {series[position].name})", "", make_diff(expected, installed))
    apply_in(scratch, edits, offset=True)


def _install(project: Project, scratch: Path, names: set[str], series: list[Patch]) -> None:
    """Put the scratch files in place, each by rename, and remember what is applied."""
    installation = project.installation
    keep = _originals(project, names) if series else {}
    for name in sorted(names):
        source, target = scratch / name, installation.site / name
        if source.is_file():
            write_atomically(target, source.read_bytes())
            if name in installation.recorded:
                os.chmod(target, 0o644)
        elif target.exists():
            target.unlink()
    _write_state(installation, series, keep)


def _originals(project: Project, names: set[str]) -> dict[str, bytes]:
    originals = project.installation.state_dir / "originals"
    found = {}
    for name in sorted(names):
        source = originals / name if (originals / name).is_file() else project.installation.site / name
        if name in project.installation.recorded:
            found[name] = source.read_bytes()
    return found


def _write_state(installation: Installation, series: list[Patch], originals: dict[str, bytes] | None = None) -> None:
    state = installation.state_dir
    if not series:
        shutil.rmtree(state, ignore_errors=True)
        return
    state.mkdir(exist_ok=True)
    for name, data in (originals or {}).items():
        (state / "originals" / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(state / "originals" / name, data)
    for patch in series:
        write_atomically(state / patch.name, patch.text.encode())
    rows = [f"{installation.checksum_of(name) or '-'} {name}\n" for name in files_of(series)]
    write_atomically(state / "checksums", "".join(rows).encode())
    write_atomically(state / "series", "".join(f"{patch.name}\n" for patch in series).encode())
