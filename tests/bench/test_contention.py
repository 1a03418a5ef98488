import subprocess
import sys

import pytest

from bench.harness import contention
from bench.harness.contention import ContentionMeter, busy_seconds
from bench.harness.engine import ROOT

STAT = """\
cpu  300 30 60 1000 50 6 4 10 0 0
cpu0 100 10 20 500 25 3 2 5 0 0
cpu1 200 20 40 500 25 3 2 5 7 0
intr 12345
"""
SPIN = "import time\nwhile time.process_time() < 0.6: pass"


def test_idle_and_waiting_for_disks_is_not_busy() -> None:
    assert busy_seconds(STAT, [0], 100) == pytest.approx(1.40)
    assert busy_seconds(STAT, [0, 1], 100) == pytest.approx(1.40 + 2.70)


@pytest.mark.parametrize("text", ["", STAT.replace("cpu1", "cpu9")])
def test_unknown_where_a_core_is_missing(text: str) -> None:
    assert busy_seconds(text, [0, 1], 100) is None


# A child that waits for a grandchild, as a server's launcher does; what a process of its own sees of them, which has no
# other descendants that may end meanwhile.
WATCH = f"""
import subprocess, sys, time
from bench.harness.contention import own_seconds

start = own_seconds()
code = "import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}]); sys.stdin.read()"
with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
    deadline = time.monotonic() + 60
    while own_seconds() - start < 0.5 and time.monotonic() < deadline:
        time.sleep(0.05)
    running = own_seconds() - start
    child.communicate()
print(running, own_seconds() - start)
"""


def test_descendants_are_ours_while_they_run_and_after_they_ended() -> None:
    done = subprocess.run([sys.executable, "-c", WATCH], cwd=ROOT, capture_output=True, text=True, check=True)
    running, after = map(float, done.stdout.split())
    assert running >= 0.5
    assert running - 0.05 <= after < running + 1.0  # neither lost nor counted twice when it ended


def test_what_is_not_ours_is_others(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(0.0, 10.0, 1.0), (4.0, 16.0, 3.0)])
    monkeypatch.setattr(ContentionMeter, "_now", staticmethod(lambda: next(readings)))
    assert ContentionMeter().other_cores() == pytest.approx((6.0 - 2.0) / 4.0)


def test_others_are_unknown_without_proc_stat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention, "busy_seconds", lambda *_: None)
    assert ContentionMeter().other_cores() is None
