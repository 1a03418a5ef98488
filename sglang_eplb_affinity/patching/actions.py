"""What `make apply | unapply | verify | status` do. Everything is computed in a scratch folder first."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.patching.series import Patch, apply_in, files_of, read_series
from sglang_eplb_affinity.patching.state import State
from sglang_eplb_affinity.patching.upstream import Installation, Upstream, checksum


@dataclass(frozen=True)
class Project:
    """The checkout's patch folder and the SGLang it acts on."""

    patches: Path
    installation: Installation

    @property
    def upstream(self) -> Upstream:
        return Upstream.read(self.patches / "UPSTREAM")

    @property
    def series(self) -> list[Patch]:
        return read_series(self.patches)

    @property
    def state(self) -> State:
        return State(self.installation)


def _nothing_more() -> None:
    pass


def apply(project: Project, before: Callable[[], None] = _nothing_more) -> str:
    """Patch the installed files. ``before`` runs when all was checked and nothing was changed yet."""
    installation, state = project.installation, project.state
    installation.require(project.upstream)
    state.sweep()
    series = project.series
    names = tuple(sorted({*state.names, *files_of(series)}))
    with pristine(project, names) as scratch:
        for patch in series:
            apply_in(scratch, patch)
        targets = {name: _checksum_or_none(scratch / name) for name in names}
        _require_nobody_else(changed_by_others(project, names, targets))
        before()
        same = [patch.text for patch in state.patches] == [patch.text for patch in series]
        if same and state.exists and all(state.is_as_applied(name) for name in files_of(series)):
            return f"already applied: {len(series)} patches on {installation.site / 'sglang'}"
        _install(project, scratch, targets, series)
    return f"applied {len(series)} patches to {len(files_of(series))} files of {installation.site / 'sglang'}"


def unapply(project: Project) -> str:
    state = project.state
    state.sweep()
    names, count = state.names, len(state.patches)
    _require_nobody_else(changed_by_others(project, names or files_of(project.series)))
    if not names:
        state.clear()
        return f"not applied: {project.installation.site / 'sglang'} is as the wheel installed it"
    with pristine(project, names) as scratch:
        _install(project, scratch, {name: _checksum_or_none(scratch / name) for name in names}, [])
    return f"took back {count or 'the'} patches; {len(names)} files match the wheel's checksums again"


def verify(project: Project) -> str:
    """Prove both directions in a scratch folder, and what is installed against them."""
    project.installation.require(project.upstream)
    state, series = project.state, project.series
    if state.interrupted:
        raise InputError(f"{project.installation.site / 'sglang'}: {_INTERRUPTED}")
    names = files_of(series)
    watched = tuple(sorted({*state.names, *names}))
    _require_nobody_else(changed_by_others(project, watched))
    with pristine(project, watched) as scratch:
        before = {name: read_text(scratch / name) for name in names}
        for patch in series:
            apply_in(scratch, patch)
        for patch in reversed(series):
            apply_in(scratch, patch, reverse=True)
        for name in names:
            if read_text(scratch / name) != before[name]:
                raise InputError(f"{name}: taking the series back does not give the wheel's file")
    return (
        f"verified: {len(series)} patches apply without fuzz or offset and come off again to {len(names)} files "
        f"whose checksums equal the wheel's RECORD (now: {'applied' if state.patches else 'not applied'})"
    )


def status(project: Project) -> str:
    installation, state, series = project.installation, project.state, project.series
    lines = [
        f"SGLang {installation.version} in {installation.site / 'sglang'} (series is for {project.upstream.version})"
    ]
    applied = [patch.text for patch in state.patches]
    in_force = "applied" if applied == [patch.text for patch in series] else "another version is applied"
    lines.append(f"series: {_INTERRUPTED if state.interrupted else in_force if applied else 'not applied'}")
    for patch in series:
        lines.append(f"  {patch.name}: {', '.join(patch.files)}")
    changed = changed_by_others(project, (*files_of(series), *state.names))
    lines.append("changed by someone else: " + (", ".join(changed) or "none"))
    return "\n".join(lines)


_INTERRUPTED = "an apply or unapply was interrupted; run `make apply` or `make unapply`, which goes on from there"


def read_text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def changed_by_others(
    project: Project, names: tuple[str, ...], targets: dict[str, str | None] | None = None
) -> list[str]:
    """Those of ``names`` that are neither the wheel's nor ours, nor what they are to become (``targets``)."""
    state, also = project.state, targets or {}
    return [
        name
        for name in sorted(set(names))
        if (now := project.installation.checksum_of(name)) not in state.expects(name)
        and not (name in also and now == also[name])
    ]


@contextmanager
def pristine(project: Project, names: tuple[str, ...]) -> Iterator[Path]:
    """A scratch folder with the wheel's version of ``names``: as installed, or as kept by apply."""
    with tempfile.TemporaryDirectory(prefix="eplb-affinity-") as name:
        scratch = Path(name)
        for file in dict.fromkeys(names):
            (scratch / file).parent.mkdir(parents=True, exist_ok=True)
            recorded = project.installation.recorded.get(file)
            if recorded is None:
                continue  # a file that the series adds
            kept, installed = project.state.original(file), project.installation.site / file
            source = next((path for path in (kept, installed) if _checksum_or_none(path) == recorded), None)
            if source is None:
                _require_nobody_else([file])
            else:
                shutil.copy(source, scratch / file)
        yield scratch


def _require_nobody_else(changed: list[str]) -> None:
    if changed:
        raise InputError(
            f"{', '.join(changed)}: changed by someone else (checksum of neither the wheel's RECORD nor this series); "
            "reinstall SGLang, or take that change back, and try again"
        )


def _checksum_or_none(path: Path) -> str | None:
    return checksum(path.read_bytes()) if path.is_file() else None


def _install(project: Project, scratch: Path, targets: dict[str, str | None], series: list[Patch]) -> None:
    """Put the scratch files in place and remember ``series`` as applied; nothing is changed if the disk is too full.

    All is written beside its place first, then renamed. The state says before the first rename what is to come.
    """
    state, site = project.state, project.installation.site
    originals = {
        name: state.original(name).read_bytes() for name in targets if series and name in project.installation.recorded
    }
    again, renamed = state.interrupted, False
    try:
        state.begin(targets, originals)
        for name, value in targets.items():
            if value is not None:
                _stage(scratch / name, site / name)
        for name, value in targets.items():
            renamed = True
            if value is not None:
                os.replace(_staged(site / name), site / name)
            else:
                (site / name).unlink(missing_ok=True)
        if series:
            state.finish(series)
        else:
            state.clear()
    except (OSError, InputError) as error:
        told = f"{error.filename or site}: {error.strerror}" if isinstance(error, OSError) else str(error)
        after = "what was begun goes on when you run this again" if renamed or again else "nothing was changed"
        raise InputError(f"{told}; {after}") from None
    finally:
        for name in targets:
            _staged(site / name).unlink(missing_ok=True)
        if not renamed and not again:
            state.cancel()


def _staged(target: Path) -> Path:
    return target.with_name(f".{target.name}.eplb-affinity.tmp")


def _stage(source: Path, target: Path) -> None:
    """Copy ``source`` beside ``target``, with its mode."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _staged(target).write_bytes(source.read_bytes())
    os.chmod(_staged(target), target.stat().st_mode & 0o777 if target.exists() else 0o644)
