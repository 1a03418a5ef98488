"""Trying a series on another version's files."""

import re
import zipfile
from pathlib import Path

import pytest

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.patching.hunks import hunks_of
from sglang_eplb_affinity.patching.series import read_series
from sglang_eplb_affinity.patching.trial import nearest, trial
from sglang_eplb_affinity.patching.upstream import series_versions
from tests.patching.conftest import ORIGINAL

PATCHES = Path(__file__).resolve().parents[2] / "patches"


@pytest.fixture
def patches(project) -> Path:
    """The fake series for 0.5.17, and one more patch that adds to the end of a.py."""
    folder = project.patches.parent / "all" / "0.5.17"
    folder.parent.mkdir()
    project.patches.rename(folder)
    return folder.parent


def wheel(folder: Path, version: str, files: dict[str, str]) -> Path:
    path = folder / f"sglang-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def results(table: str) -> list[str]:
    return [line.split(" | ")[3] for line in table.splitlines() if line.startswith("| ") and "patch |" not in line]


def test_on_its_own_version_every_hunk_applies_at_its_line(patches: Path, tmp_path: Path) -> None:
    table = trial(patches, str(wheel(tmp_path, "0.5.17", ORIGINAL)))
    assert results(table) == ["applies"] * 4
    assert table.startswith(
        "Series for 0.5.17 on SGLang 0.5.17: 4 hunks: 4 applies, 0 moved, 0 already there, 0 fails\n"
    )


def test_moved_failing_and_known_hunks_are_told_apart(patches: Path, tmp_path: Path) -> None:
    text = "new line\n" + ORIGINAL["sglang/a.py"].replace("line 18\n", "line eighteen\n")
    newer = {**ORIGINAL, "sglang/a.py": text, "sglang/b.py": "x = 1\ny = 3\n", "sglang/new.py": "theirs\n"}
    table = trial(patches, str(wheel(tmp_path, "0.5.18", newer)))
    rows = [line for line in table.splitlines() if line.startswith("| one") or line.startswith("| two")]
    assert rows[0] == "| one | sglang/a.py | 3 | moved | line 4 |"
    assert rows[1] == "| two | sglang/a.py | 19 | fails | near line 20: no `line 18` |"
    assert rows[2] == "| two | sglang/b.py | 1 | already there | line 1 |"
    assert rows[3] == "| two | sglang/new.py | 0 | fails | the file is there already |"
    assert "1 moved, 1 already there, 2 fails" in table


def test_a_file_that_is_gone(patches: Path, tmp_path: Path) -> None:
    table = trial(patches, str(wheel(tmp_path, "0.5.18", {"sglang/b.py": ORIGINAL["sglang/b.py"]})))
    assert results(table) == ["fails", "fails", "applies", "applies"] and "no such file" in table


def test_the_nearest_series_is_tried() -> None:
    assert nearest(["0.5.17", "0.5.23"], "0.5.18") == "0.5.17"
    assert nearest(["0.5.17", "0.5.23"], "0.5.20") == "0.5.23"
    assert nearest(["0.5.17", "0.5.23"], "0.6.0rc1") == "0.5.23"


def test_bad_input_is_named(patches: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a wheel's file or a version"):
        trial(patches, "newest")
    with pytest.raises(InputError, match=r"cannot be read as a wheel \(No such file"):
        trial(patches, str(tmp_path / "sglang-0.5.18-py3-none-any.whl"))
    with pytest.raises(InputError, match="not named like a wheel of SGLang"):
        trial(patches, "torch-2.whl")
    with pytest.raises(InputError, match=r"--series 0\.5\.9: there are series for 0\.5\.17"):
        trial(patches, str(wheel(tmp_path, "0.5.18", ORIGINAL)), "0.5.9")


@pytest.mark.parametrize("version", series_versions(PATCHES))
def test_hunks_of_the_real_series_are_read_whole(version: str) -> None:
    """As many lines as each hunk's header says."""
    for patch in read_series(PATCHES / version):
        headers = re.findall(r"^@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@", patch.diff, re.M)
        sizes = [(int(old or 1), int(new or 1)) for old, new in headers]
        hunks = list(hunks_of(patch.diff))
        assert [(len(hunk.old), len(hunk.new)) for hunk in hunks] == sizes
        assert {hunk.file for hunk in hunks} == set(patch.files)
