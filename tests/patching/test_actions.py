"""apply, unapply, verify and refresh on a small fake installation."""

import shutil
from pathlib import Path

import pytest

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.patching import actions
from sglang_eplb_affinity.patching.refresh import refresh
from sglang_eplb_affinity.patching.upstream import Installation, series_folder
from tests.patching.conftest import ORIGINAL, site_files


def test_apply_changes_the_files_and_unapply_gives_them_back(project) -> None:
    assert "applied 2 patches" in actions.apply(project)
    patched = site_files(project)
    assert "line five" in patched["sglang/a.py"] and "line 20\n" not in patched["sglang/a.py"]
    assert patched["sglang/b.py"] == "x = 1\ny = 3\n" and patched["sglang/new.py"] == "added = 1\n"
    assert "match the wheel's checksums" in actions.unapply(project)
    assert site_files(project) == ORIGINAL
    assert not project.state.exists


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
    for action in (actions.apply, actions.verify, refresh):
        with pytest.raises(InputError, match=r"is SGLang 0\.5\.23, but the series is for 0\.5\.17"):
            action(wrong)


def test_verify_proves_both_directions(project) -> None:
    assert "not applied" in actions.verify(project)
    actions.apply(project)
    assert "now: applied" in actions.verify(project)


def test_refresh_without_edits_leaves_no_diff(project) -> None:
    actions.apply(project)
    before = {path.name: path.read_bytes() for path in project.patches.iterdir()}
    assert "changed: none" in refresh(project)
    assert before == {path.name: path.read_bytes() for path in project.patches.iterdir()}


def test_refresh_brings_an_edit_into_the_named_patch(project) -> None:
    actions.apply(project)
    path = project.installation.site / "sglang/a.py"
    path.write_text(path.read_text().replace("line 9\n", "line nine\n"))
    assert "changed: one.patch" in refresh(project, "one.patch")
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
    refresh(project, "one.patch")
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
        refresh(project, "three.patch")


def test_the_series_is_that_of_the_installed_version(tmp_path: Path) -> None:
    for version in ("0.5.9", "0.5.17"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "series").write_text("")
    assert series_folder(tmp_path, "0.5.9") == tmp_path / "0.5.9"
    with pytest.raises(InputError, match=r"SGLang 0\.5\.18: this project has series for 0\.5\.9 and 0\.5\.17; install"):
        series_folder(tmp_path, "0.5.18")


def test_a_reinstalled_wheel_is_patched_again(project) -> None:
    actions.apply(project)
    patched = site_files(project)
    for name, text in ORIGINAL.items():
        (project.installation.site / name).write_text(text)
    assert "applied 2 patches" in actions.apply(project)
    assert site_files(project) == patched


def test_what_an_upgrade_of_sglang_left_is_removed(project) -> None:
    """`pip install -U sglang` takes away what the old wheel had, not what the series added beside it."""
    actions.apply(project)
    site = project.installation.site
    for name, text in ORIGINAL.items():
        (site / name).write_text(text)
    shutil.copytree(project.installation.dist_info, site / "sglang-0.5.23.dist-info")
    shutil.rmtree(project.installation.dist_info)
    (project.patches / "UPSTREAM").write_text("version: 0.5.23\n")
    upgraded = actions.Project(project.patches, Installation(site, site / "sglang-0.5.23.dist-info", "0.5.23"))
    assert "applied 2 patches" in actions.apply(upgraded)
    actions.unapply(upgraded)
    assert site_files(upgraded) == ORIGINAL
    assert sorted(path.name for path in site.iterdir()) == ["sglang", "sglang-0.5.23.dist-info"]


def test_state_kept_in_the_dist_info_is_taken_over(project) -> None:
    actions.apply(project)
    inside = project.installation.dist_info / "eplb_affinity_patches"
    project.state.folder.rename(inside)
    assert project.state.folder == inside and "already applied" in actions.apply(project)
    (project.patches / "series").write_text("one.patch\n")
    actions.apply(project)
    assert not inside.exists() and project.state.exists
    actions.unapply(project)
    assert site_files(project) == ORIGINAL
