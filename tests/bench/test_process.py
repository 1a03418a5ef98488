import os
import sys
import time
from pathlib import Path

import pytest

from bench.harness.engine import ROOT
from bench.harness.process import last_error, pause_group, resume_group, scrub, start_group, stop_group

# A leader that ignores SIGTERM and has a child that does so too, as a hanging server would.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
hang = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", hang])
print(child.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_nothing_of_a_stubborn_group_is_left(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start_group([sys.executable, "-c", STUBBORN], log, os.environ)
    deadline = time.monotonic() + 20
    while not log.read_text().strip() and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(log.read_text())
    stop_group(process, patience_s=0.5)
    assert process.returncode is not None and gone(child)


def comes_to(pid: int, state: str, seconds: float = 10) -> bool:
    """Whether a process is in this state soon; a signal takes a moment."""
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != state:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_a_paused_group_stands_still_with_its_workers_and_can_be_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    busy = "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'while True: pass'])\n"
    process = start_group([sys.executable, "-c", busy + "print(child.pid, flush=True)\nchild.wait()"], log, os.environ)
    deadline = time.monotonic() + 20
    while not log.read_text().strip() and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(log.read_text())
    pause_group(process)
    assert comes_to(child, "T") and comes_to(process.pid, "T")
    resume_group(process)
    assert comes_to(child, "R")
    pause_group(process)
    stop_group(process, patience_s=5)
    assert process.returncode is not None and gone(child)


def test_stopping_what_has_ended_is_harmless(tmp_path: Path) -> None:
    process = start_group([sys.executable, "-c", "pass"], tmp_path / "log", os.environ)
    process.wait(20)
    stop_group(process)


def test_published_logs_name_no_folder_of_this_machine() -> None:
    text = f"File {ROOT}/bench/x.py\n{sys.prefix}/lib/y.py\n10%\r50%\r100% done\r\nlast"
    out = scrub(text)
    assert str(ROOT) not in out and sys.prefix not in out
    assert out.splitlines() == ["File ./bench/x.py", out.splitlines()[1], "100% done", "last"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("KeyError: 8\nPyspy failed (py-spy dump). Error: not found\nwaiting", "KeyError: 8"),
        ("ok\nValueError: bad flag\nbye", "ValueError: bad flag"),
        ("only\nthis", "this"),
        ("", "nothing there"),
    ],
)
def test_the_one_line_that_says_why(tmp_path: Path, text: str, line: str) -> None:
    log = tmp_path / "log"
    log.write_text(text)
    assert last_error(log, "nothing there") == line
