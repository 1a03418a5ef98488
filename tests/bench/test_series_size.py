"""The size of a patch series, counted by eye here."""

from pathlib import Path

from bench.publish.series_size import size_of

PATCH = """What: w
Why: w
Origin: o
Drop: d

--- a/sglang/a.py
+++ b/sglang/a.py
@@ -1,3 +1,4 @@
 one
-two
+2
+2.5
 three
@@ -9,2 +10,2 @@
 nine
---ten
+++eleven
--- /dev/null
+++ b/sglang/b.py
@@ -0,0 +1 @@
+new
"""


def test_hunks_and_changed_lines(tmp_path: Path) -> None:
    (tmp_path / "series").write_text("# a comment\nthe.patch\n")
    (tmp_path / "the.patch").write_text(PATCH)
    assert size_of(tmp_path) == (3, 6)
