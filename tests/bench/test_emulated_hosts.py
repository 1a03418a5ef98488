"""Two hosts on one machine: what they share, what they do not, and that nothing is left of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bench.engines.emulated_hosts import ADDRESSES, NAMES, EmulatedHosts, emulation_missing
from bench.harness.engine import ROOT

LISTEN = (
    "import socket; s = socket.create_server(('', 4321)); print('up', flush=True); c, _ = s.accept(); c.sendall(b'hi')"
)
ASK = f"import socket; print(socket.create_connection(('{NAMES[1]}', 4321), 20).recv(9))"


@pytest.fixture
def hosts() -> Iterator[EmulatedHosts]:
    if reason := emulation_missing():
        pytest.skip(reason)
    with EmulatedHosts(gbit=1) as found:
        yield found


def on(hosts: EmulatedHosts, host: int, *command: str, directory: Path | None = None) -> str:
    done = subprocess.run(hosts.command(host, command, directory), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_each_has_its_name_and_address_and_reaches_the_other(hosts: EmulatedHosts) -> None:
    for host in (0, 1):
        assert on(hosts, host, "hostname") == NAMES[host]
        assert f"inet {ADDRESSES[host]}/24" in on(hosts, host, "ip", "addr", "show", "eth0")
    with subprocess.Popen(
        hosts.command(1, [sys.executable, "-c", LISTEN]), stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None and server.stdout.readline() == "up\n"
        assert on(hosts, 0, sys.executable, "-c", ASK) == "b'hi'"


def test_memory_is_not_shared_but_files_are(hosts: EmulatedHosts, tmp_path: Path) -> None:
    on(hosts, 0, "touch", "/dev/shm/of-host0", str(tmp_path / "file"))
    assert on(hosts, 0, "ls", "/dev/shm") == "of-host0" and on(hosts, 1, "ls", "/dev/shm") == ""
    assert not Path("/dev/shm/of-host0").exists()
    assert on(hosts, 1, "ls", directory=tmp_path) == "file"


def test_the_second_is_reached_as_by_ssh(hosts: EmulatedHosts) -> None:
    assert on(hosts, 0, "ssh", "-tt", "-o", "BatchMode=yes", NAMES[1], "cd / && hostname && pwd") == f"{NAMES[1]}\n/"
    wrong = subprocess.run(hosts.command(0, ["ssh", "elsewhere", "hostname"]), capture_output=True, text=True)
    assert wrong.returncode == 255 and "no emulated host elsewhere" in wrong.stderr


def test_a_thread_in_the_network_of_a_host_comes_back(hosts: EmulatedHosts) -> None:
    before = Path("/proc/thread-self/ns/net").readlink()
    with hosts.network(0):
        assert Path("/proc/thread-self/ns/net").readlink() != before
    assert Path("/proc/thread-self/ns/net").readlink() == before


def test_nothing_is_left(hosts: EmulatedHosts) -> None:
    tenants = [psutil.Process(hosts.tenant(host)) for host in (0, 1)]
    hosts.__exit__(None, None, None)
    assert not any(tenant.is_running() for tenant in tenants)


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.engines.emulated_hosts", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.usefixtures("hosts")
def test_the_command_line_gives_the_commands_exit_code() -> None:
    done = program("--", "sh", "-c", f"hostname; ssh {NAMES[1]} hostname; exit 7")
    assert (done.returncode, done.stdout) == (7, "host0\nhost1\n")


def test_what_ends_it_while_the_command_starts_ends_the_command_too() -> None:
    script = """
import os, signal, subprocess
from bench.engines import emulated_hosts
class Early(subprocess.Popen):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)
emulated_hosts.subprocess.Popen = Early
print(emulated_hosts._run_to_its_end(["sleep", "600"]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, str(-signal.SIGTERM)), done.stderr


@pytest.mark.usefixtures("hosts")
def test_what_ends_it_ends_the_command() -> None:
    command = [sys.executable, "-m", "bench.engines.emulated_hosts", "sh", "-c", "echo $$; exec sleep 4321"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        inside = psutil.Process(int(process.stdout.readline()))
        process.terminate()
        assert process.wait(30)
    _, alive = psutil.wait_procs([inside], timeout=30)
    assert not alive


@pytest.mark.parametrize(("arguments", "message"), [((), "no command"), (("--gbit", "0", "true"), "--gbit 0.0")])
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = program(*arguments)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
