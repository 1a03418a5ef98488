"""A real Prometheus on this machine: Debian's package, unpacked in .cache/ where it is not installed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.harness.ports import free_port
from bench.harness.process import start_group, stop_group

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "prometheus"


def program(name: str) -> Path:
    """``prometheus`` or ``promtool``; skips the test, the reason printed, where it cannot be had."""
    installed = shutil.which(name)
    if installed:
        return Path(installed)
    unpacked = CACHE / "usr" / "bin" / name
    if not unpacked.is_file():
        CACHE.parent.mkdir(exist_ok=True)
        with open(CACHE.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not unpacked.is_file():
                _unpack()
    return unpacked


def _unpack() -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("no prometheus on this machine, and no apt-get to get Debian's package with")
    folder = CACHE.with_name("prometheus-new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for command in (
        ["apt-get", "download", "prometheus"],
        ["apt-get", "update"],
        ["apt-get", "download", "prometheus"],
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        packages = list(folder.glob("prometheus_*.deb"))
        if packages:
            subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(folder)], check=True)
            packages[0].unlink()
            folder.rename(CACHE)
            return
    pytest.skip(
        f"no prometheus on this machine, and `apt-get download prometheus` failed: {done.stderr.strip()[-200:]}"
    )


class Refused(AssertionError):
    """Prometheus answered a query with an error."""


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        """``data`` of the API's answer."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as response:
                return json.loads(response.read())["data"]
        except urllib.error.HTTPError as error:
            raise Refused(f"{parameters}: {error.code} {error.read().decode()}") from None

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each sample."""
        found = self.get("query", query=expression)
        return [(sample["metric"], float(sample["value"][1])) for sample in found["result"]]


@contextmanager
def prometheus(targets: list[str], rules: Path, folder: Path) -> Iterator[Prometheus]:
    """Scrapes ``targets`` (host:port) every second, once all of them have been scraped."""
    folder.mkdir(exist_ok=True)
    listen = f"127.0.0.1:{free_port()}"
    config = folder / "prometheus.yml"
    jobs = [{"job_name": "servers", "static_configs": [{"targets": targets}]}]
    intervals = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config.write_text(json.dumps({"global": intervals, "rule_files": [str(rules)], "scrape_configs": jobs}))
    command = [str(program("prometheus")), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    process = start_group([*command, f"--web.listen-address={listen}"], folder / "log", os.environ, folder)
    try:
        server = Prometheus(f"http://{listen}")
        deadline = time.monotonic() + 60
        while not _all_up(server, len(targets)):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(0.3)
        yield server
    finally:
        stop_group(process, 5)


def _all_up(server: Prometheus, targets: int) -> bool:
    """Whether all have been scraped; until its storage is open, a Prometheus that listens answers 503."""
    try:
        return sum(value for _, value in server.query("up")) == targets
    except (OSError, Refused):
        return False
