"""`make refresh`: write the series again, with what was edited in the installed files since."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically
from sglang_eplb_affinity.patching.actions import Project, read_text
from sglang_eplb_affinity.patching.series import Patch, apply_in, files_of, make_diff
from sglang_eplb_affinity.patching.upstream import checksum


def refresh(project: Project, topic: str | None = None, wheel: Path | None = None) -> str:
    """Write the series again. Edits made to the installed files since apply go into ``topic`` (default: the last).

    ``wheel`` is needed when a file was edited that the series did not touch before: its original comes from there.
    """
    project.installation.require(project.upstream)
    series, state = project.series, project.state
    target = topic or (series[-1].name if series else "")
    if target not in [patch.name for patch in series]:
        raise InputError(f"TOPIC={topic}: not in the series; known: {', '.join(p.name for p in series)}")
    if [patch.text for patch in state.patches] != [patch.text for patch in series]:
        raise InputError("patches: the series in force is not this checkout's; run `make apply` before `make refresh`")
    names = _watched(project, series)
    with _originals(project, names, wheel) as scratch:
        keep = {n: (scratch / n).read_bytes() for n in names if (scratch / n).is_file()}
        rewritten, position = [], [patch.name for patch in series].index(target)
        for index, patch in enumerate(series):
            before = {name: read_text(scratch / name) for name in names}
            apply_in(scratch, patch, offset=True)
            if index == position:
                _merge_edits(project, scratch, names, series, position)
            after = {name: read_text(scratch / name) for name in names}
            rewritten.append(Patch(patch.name, patch.header, make_diff(before, after)))
    changed = [new.name for new, old in zip(rewritten, series, strict=True) if new.text != old.text]
    for patch in rewritten:
        if patch.name in changed:
            write_atomically(project.patches / patch.name, patch.text.encode())
    touched = files_of(rewritten)
    state.begin(
        {name: project.installation.checksum_of(name) for name in touched},
        {name: data for name, data in keep.items() if name in touched},
    )
    state.finish(rewritten)
    return f"refreshed {len(rewritten)} patches; changed: {', '.join(changed) or 'none'}"


def _watched(project: Project, series: list[Patch]) -> tuple[str, ...]:
    """Files of the series, and any other .py file of SGLang that differs from RECORD (edits to be refreshed in)."""
    installation, names = project.installation, set(files_of(series))
    for path in (installation.site / "sglang").rglob("*.py"):
        name = path.relative_to(installation.site).as_posix()
        if installation.checksum_of(name) != installation.recorded.get(name):
            names.add(name)
    return tuple(sorted(names))


@contextmanager
def _originals(project: Project, names: tuple[str, ...], wheel: Path | None) -> Iterator[Path]:
    """A scratch folder with the wheel's version of ``names``, as kept by apply or from ``wheel``."""
    with tempfile.TemporaryDirectory(prefix="eplb-affinity-") as folder:
        scratch = Path(folder)
        for name in names:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            recorded = project.installation.recorded.get(name)
            if recorded is None:
                continue  # a file that the series or an edit adds
            data = project.state.original(name).read_bytes() if project.state.original(name).is_file() else b""
            if checksum(data) != recorded:
                if wheel is None:
                    raise InputError(f"{name}: its original is not at hand; name SGLang's wheel with WHEEL=file")
                with zipfile.ZipFile(wheel) as archive:
                    data = archive.read(name)
            if checksum(data) != recorded:
                raise InputError(f"{wheel}: {name} is not that of the installed SGLang {project.installation.version}")
            (scratch / name).write_bytes(data)
        yield scratch


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
        expected = {name: read_text(full / name) for name in names}
    installed = {name: read_text(project.installation.site / name) for name in names}
    edits = Patch(f"(edits for {series[position].name})", "", make_diff(expected, installed))
    apply_in(scratch, edits, offset=True)
