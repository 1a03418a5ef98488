"""A small fake installation with a series of two patches."""

from pathlib import Path

import pytest

from sglang_eplb_affinity.patching.actions import Project
from sglang_eplb_affinity.patching.series import HEADER_FIELDS, make_diff
from sglang_eplb_affinity.patching.upstream import Installation, checksum

ORIGINAL = {
    "sglang/a.py": "".join(f"line {n}\n" for n in range(30)),
    "sglang/b.py": "x = 1\ny = 2",
    "sglang/c.py": "untouched = True\n",
}
HEADER = "".join(f"{field} test\n" for field in HEADER_FIELDS) + "\n"


def make_project(folder: Path) -> Project:
    site, patches = folder / "site", folder / "patches"
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
    return Project(patches, Installation(site, dist_info, "0.5.17"))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path)


def site_files(project: Project) -> dict[str, str]:
    """Every Python file of the installation, hidden ones too."""
    site = project.installation.site
    files = (path for path in (site / "sglang").rglob("*") if path.is_file())
    return {path.relative_to(site).as_posix(): path.read_text() for path in files}
