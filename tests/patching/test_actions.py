"""apply, unapply, verify and refresh on a small fake installation."""

from pathlib import Path

import pytest

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.patching import actions
from sglang_eplb_affinity.patching.series import HEADER_FIELDS, make_diff
from sglang_eplb_affinity.patching.upstream import Installation, checksum, series_folder

ORIGINAL = {
    "sglang/a.py": "".join(f"line {n}\n" for n in range(30)),
    "sglang/b.py": "x = 1\ny = 2",
    "sglang/c.py": "untouched = True\n",
}
HEADER = "".join(f"{field} test\n" for field in HEADER_FIELDS) + "\n"


@pytest.fixture
def project(tmp_path) -> actions.Project:
    site, patches = tmp_path / "site", tmp_path / "patches"
    dist_info = site / "sglang-0.5.17.dist-info"
    dist_info.mkdir(parents=True)
    (site / "sglang").mkdir()
    patches.mkdir()
    for name, text in ORIGINAL.items():
        (site / name).write_text(text)
    (dist_info / "RECORD").write_text(
        "".join(f"{name},{checksum(text.encode())},{len(text)}\n" for name, text in ORIGINAL.items())
    )
    (patches / "UPSTREAM").write_text("version: 0.5.17\n")
    first = {**ORIGINAL, "sglang/a.py": ORIGINAL["sglang/a.py"].replace("line 5\n", "line five\nline 5b\n")}
    second = {
        **first,
        "sglang/a.py": first["sglang/a.py"].replace("line 20\n", ""),
        "sglang/b.py": "x = 1\ny = 3\n",
        "sglang/new.py": "added = 1\n",
    }
    (patches / "one.patch").write_text(HEADER + make_diff(ORIGINAL, first))
    (patches / "two.patch").write_text(HEADER + make_diff(first, second))
    (patches / "series").write_text("# comment\none.patch\ntwo.patch\n")
    return actions.Project(patches, Installation(site, dist_info, "0.5.17"))


def site_files(project: actions.Project) -> dict[str, str]:
    site = project.installation.site
    return {path.relative_to(site).as_posix(): path.read_text() for path in (site / "sglang").rglob("*.py")}


def test_apply_changes_the_files_and_unapply_gives_them_back(project) -> None:
    assert "applied 2 patches" in actions.apply(project)
    patched = site_files(project)
    assert "line five" in patched["sglang/a.py"] and "line 20\n" not in patched["sglang/a.py"]
    assert patched["sglang/b.py"] == "x = 1\ny = 3\n" and patched["sglang/new.py"] == "added = 1\n"
    assert "match the wheel's checksums" in actions.unapply(project)
    assert site_files(project) == ORIGINAL
    assert not project.installation.state_dir.exists()


def test_apply_twice_does_nothing_more(project) -> None:
    actions.apply(project)
    before = {path: path.stat().st_mtime_ns for path in (project.installation.site / "sglang").rglob("*.py")}
    assert "already applied" in actions.apply(project)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_unapply_without_apply_says_so(project) -> None:
    assert "not applied" in actions.unapply(project)


def test_a_newer_series_replaces_the_older_one(project) -> None:
    actions.apply(project)
    (project.patches / "series").write_text("one.patch\n")
    actions.apply(project)
    files = site_files(project)
    assert "line five" in files["sglang/a.py"] and "line 20\n" in files["sglang/a.py"]
    assert files["sglang/b.py"] == ORIGINAL["sglang/b.py"] and "sglang/new.py" not in files
    actions.unapply(project)
    assert site_files(project) == ORIGINAL


@pytest.mark.parametrize("applied", [False, True])
def test_files_changed_by_someone_else_are_named_and_left_alone(project, applied) -> None:
    if applied:
        actions.apply(project)
    path = project.installation.site / "sglang/b.py"
    path.write_text("mine = True\n")
    before = site_files(project)
    for action in (actions.apply, actions.unapply, actions.verify):
        with pytest.raises(InputError, match=r"sglang/b\.py: changed by someone else"):
            action(project)
    assert site_files(project) == before
    assert "changed by someone else: sglang/b.py" in actions.status(project)


def test_a_patch_that_does_not_fit_changes_nothing(project) -> None:
    text = (project.patches / "two.patch").read_text()
    (project.patches / "two.patch").write_text(text.replace(" line 18\n", " line eighteen\n"))
    with pytest.raises(InputError, match=r"two\.patch: does not apply"):
        actions.apply(project)
    assert site_files(project) == ORIGINAL


def test_an_offset_is_refused(project) -> None:
    text = (project.patches / "one.patch").read_text()
    (project.patches / "one.patch").write_text(text.replace("@@ -3,7 +3,8 @@", "@@ -5,7 +5,8 @@"))
    with pytest.raises(InputError, match=r"one\.patch: does not apply .*offset"):
        actions.apply(project)
    assert site_files(project) == ORIGINAL


def test_wrong_version_is_refused(project) -> None:
    wrong = actions.Project(
        project.patches, Installation(project.installation.site, project.installation.dist_info, "0.5.23")
    )
    for action in (actions.apply, actions.verify, actions.refresh):
        with pytest.raises(InputError, match=r"is SGLang 0\.5\.23, but the series is for 0\.5\.17"):
            action(wrong)


def test_verify_proves_both_directions(project) -> None:
    assert "not applied" in actions.verify(project)
    actions.apply(project)
    assert "now: applied" in actions.verify(project)


def test_refresh_without_edits_leaves_no_diff(project) -> None:
    actions.apply(project)
    before = {path.name: path.read_bytes() for path in project.patches.iterdir()}
    assert "changed: none" in actions.refresh(project)
    assert before == {path.name: path.read_bytes() for path in project.patches.iterdir()}


def test_refresh_brings_an_edit_into_the_named_patch(project) -> None:
    actions.apply(project)
    path = project.installation.site / "sglang/a.py"
    path.write_text(path.read_text().replace("line 9\n", "line nine\n"))
    assert "changed: one.patch" in actions.refresh(project, "one.patch")
    assert "+line nine" in (project.patches / "one.patch").read_text()
    assert "already applied" in actions.apply(project)
    assert "line nine" in site_files(project)["sglang/a.py"]
    actions.unapply(project)
    assert site_files(project) == ORIGINAL


def test_an_edit_that_moves_the_lines_of_later_patches_is_taken_in(project) -> None:
    actions.apply(project)
    path = project.installation.site / "sglang/a.py"
    path.write_text("one more\n" + path.read_text().replace("line 25\n", "line 25\nline 25b\n"))
    edited = path.read_text()
    actions.refresh(project, "one.patch")
    assert "+one more" in (project.patches / "one.patch").read_text()
    actions.unapply(project)
    actions.apply(project)
    assert path.read_text() == edited


def test_a_patch_without_its_header_is_refused(project) -> None:
    text = (project.patches / "one.patch").read_text()
    (project.patches / "one.patch").write_text(text.replace("Drop: test\n", ""))
    with pytest.raises(InputError, match="header lacks Drop:"):
        actions.apply(project)


def test_unknown_topic_is_refused(project) -> None:
    actions.apply(project)
    with pytest.raises(InputError, match=r"TOPIC=three\.patch: not in the series"):
        actions.refresh(project, "three.patch")


def test_the_series_is_that_of_the_installed_version(tmp_path: Path) -> None:
    for version in ("0.5.9", "0.5.17"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "series").write_text("")
    assert series_folder(tmp_path, "0.5.9") == tmp_path / "0.5.9"
    with pytest.raises(InputError, match=r"SGLang 0\.5\.18: this project has series for 0\.5\.9 and 0\.5\.17; install"):
        series_folder(tmp_path, "0.5.18")
