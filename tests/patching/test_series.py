"""The project's own series; that of the installed SGLang on a copy of it."""

import importlib.metadata
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.patching import actions
from sglang_eplb_affinity.patching.refresh import refresh
from sglang_eplb_affinity.patching.series import files_of, read_series
from sglang_eplb_affinity.patching.state import State
from sglang_eplb_affinity.patching.upstream import Installation, Upstream, series_folder, series_versions
from sglang_eplb_affinity.sglang_hooks import arguments, server_arguments

PATCHES = Path(__file__).resolve().parents[2] / "patches"
VERSIONS = series_versions(PATCHES)


@pytest.fixture
def project(tmp_path) -> actions.Project:
    """A copy of the files that the series touches, as the wheel installed them."""
    try:
        importlib.metadata.distribution("sglang")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("SGLang is not installed; run `make setup`")
    here = Installation.find()
    dist_info = tmp_path / here.dist_info.name
    dist_info.mkdir()
    shutil.copy(here.dist_info / "RECORD", dist_info)
    patches = series_folder(PATCHES, here.version)
    for name in files_of(read_series(patches)):
        kept = State(here).folder / "originals" / name
        source = kept if kept.is_file() else here.site / name
        if name in here.recorded:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, tmp_path / name)
    return actions.Project(patches, Installation(tmp_path, dist_info, here.version))


def test_series_applies_comes_off_and_refreshes_without_a_diff(project) -> None:
    names = [name for name in files_of(project.series) if name in project.installation.recorded]
    assert "verified" in actions.verify(project)
    actions.apply(project)
    for name in files_of(project.series):
        compile((project.installation.site / name).read_text(), name, "exec")
    assert "changed: none" in refresh(project)
    actions.unapply(project)
    for name in names:
        assert project.installation.checksum_of(name) == project.installation.recorded[name]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_patch_alone_in_the_folder_is_in_the_series(version: str) -> None:
    folder = PATCHES / version
    listed = [patch.name for patch in read_series(folder)]
    assert sorted(listed) == sorted(path.name for path in folder.glob("*.patch"))
    assert all(patch.diff for patch in read_series(folder))


@pytest.mark.parametrize("version", VERSIONS)
def test_upstream_names_wheels_with_checksums(version: str) -> None:
    upstream = Upstream.read(PATCHES / version / "UPSTREAM")
    assert upstream.version == version and upstream.wheels
    assert all(name.startswith(f"sglang-{version}-") and len(value) == 64 for name, value in upstream.wheels)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_server_on_an_older_series_says_so(version: str) -> None:
    """The flags that the package looks for are those that the series adds; without one of them the start is refused."""
    patches = sorted((PATCHES / version).glob("*.patch"))
    added = {
        name for patch in patches for name in re.findall(r"^\+    ([a-z0-9_]+): A\[", patch.read_text(), re.MULTILINE)
    }
    assert added == set(server_arguments.ADDED)
    older = SimpleNamespace(**dict.fromkeys(added - {"eplb_record_map"}))
    with pytest.raises(InputError, match="without --eplb-record-map; run `make apply`"):
        arguments.resolve(older)
