"""Two hosts on one machine, for rehearsing what crosses a network without a second machine.

Each is a set of Linux namespaces: a network of its own (joined to the other's by a virtual cable), a host name and
shared memory. Processors and files are the machine's; of its GPUs each host has its half first. The command runs on
``host0``, and finds an ``ssh`` that reaches ``host1``:

    python -m bench.engines.emulated_hosts python -m bench run --other-hosts host1 --dist-init-addr host0:5000
    python -m bench.engines.emulated_hosts --gbit 10 sh -c 'hostname; ssh host1 hostname'

Needs Linux with util-linux and iproute2, and root or user namespaces. Nothing is left behind: the namespaces go with
the processes in them.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from sglang_eplb_affinity.domain.errors import InputError

NAMES = ("host0", "host1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname")
_KINDS = ("net", "uts", "mnt")  # of nsenter: --net --uts --mount
# A tenant of the namespaces: it ends when this process does, which closes its standard input.
_TENANT = """set -e
mount -t tmpfs tmpfs /dev/shm
mount --bind {hosts} /etc/hosts
hostname {name}
ip link set lo up
echo ready
exec cat
"""
# Options are taken and forgotten; -tt and the like have no argument, -o has one.
_SSH = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do [ "$1" = -o ] && shift; shift; done
case "$1" in {name}|{address}) shift;; *) echo "ssh: no emulated host $1; there is {name}" >&2; exit 255;; esac
{gpus}exec nsenter -t {pid} --net --uts --mount -- sh -c "$*"
"""


class EmulatedHosts:
    """Use as a context manager. ``gbit``: rate of the cable in each direction in Gbit/s, None: as fast as it goes."""

    def __init__(self, gbit: float | None = None) -> None:
        self._gbit = gbit
        self._tenants: list[subprocess.Popen[str]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="emulated-hosts-")

    def __enter__(self) -> EmulatedHosts:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop()

    def command(self, host: int, command: Sequence[str], directory: Path | None = None) -> list[str]:
        """``command`` as it runs on ``host``, in ``directory`` or this process's; on host0 ``ssh`` reaches host1."""
        text = f"cd {shlex.quote(str(directory or Path.cwd()))} && exec {shlex.join(command)}"
        if host == 0:
            text = f'PATH={shlex.quote(self._folder.name)}:"$PATH" && export PATH && {text}'
        if host == 1:
            text = _gpus_of_second() + text
        return ["nsenter", "-t", str(self._tenants[host].pid), "--net", "--uts", "--mount", "--", "sh", "-c", text]

    def tenant(self, host: int) -> int:
        """The process whose namespaces are ``host``, for :func:`enter`."""
        return self._tenants[host].pid

    @contextmanager
    def network(self, host: int) -> Iterator[None]:
        """The network of ``host`` in this thread, and in the threads that it starts meanwhile."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _setns(os.open(f"/proc/{self.tenant(host)}/ns/net", os.O_RDONLY))
            yield
        finally:
            _setns(before)

    def _start(self) -> None:
        tools = _TOOLS if self._gbit is None else (*_TOOLS, "tc")
        if missing := [tool for tool in tools if shutil.which(tool) is None]:
            raise InputError(f"emulated hosts need {missing[0]}, which this machine does not have")
        hosts = Path(self._folder.name, "hosts")
        lines = ["127.0.0.1 localhost", *(f"{a} {n}" for a, n in zip(ADDRESSES, NAMES, strict=True))]
        hosts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for name in NAMES:
            command = ["unshare", "--net", "--uts", "--mount", "sh", "-c"]
            tenant = subprocess.Popen(
                [*command, _TENANT.format(hosts=shlex.quote(str(hosts)), name=name)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C is for the command
            )
            self._tenants.append(tenant)
            assert tenant.stdout is not None
            answer = tenant.stdout.readline().strip()
            if answer != "ready":
                raise InputError(f"emulated hosts need root or user namespaces, but: {answer or 'no answer'}")
        pids = [str(tenant.pid) for tenant in self._tenants]
        cable = ["link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns"]
        self._ip(0, [*cable, pids[1]])
        for host, (own, other) in enumerate(zip(ADDRESSES, reversed(ADDRESSES), strict=True)):
            self._ip(host, ["addr", "add", f"{own}/24", "dev", "eth0"])
            self._ip(host, ["link", "set", "eth0", "up"])
            # A host's own address is looked up as the one that it would reach the world from.
            self._ip(host, ["route", "add", "default", "via", other])
            if self._gbit is not None:
                rate = ["root", "tbf", "rate", f"{round(self._gbit * 1e6)}kbit", "burst", "1mb", "latency", "50ms"]
                self._run(host, ["tc", "qdisc", "add", "dev", "eth0", *rate])
        ssh = Path(self._folder.name, "ssh")
        ssh.write_text(
            _SSH.format(name=NAMES[1], address=ADDRESSES[1], pid=pids[1], gpus=_gpus_of_second()), encoding="utf-8"
        )
        ssh.chmod(0o755)

    def _ip(self, host: int, arguments: Sequence[str]) -> None:
        self._run(host, ["ip", *arguments])

    def _run(self, host: int, command: Sequence[str]) -> None:
        inside = ["nsenter", "-t", str(self._tenants[host].pid), "--net", "--", *command]
        done = subprocess.run(inside, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"emulated hosts: `{shlex.join(command)}` failed: {done.stderr.strip()}")

    def _stop(self) -> None:
        for tenant in self._tenants:
            tenant.kill()
            tenant.communicate()
        self._tenants.clear()
        self._folder.cleanup()


def emulation_missing() -> str | None:
    """Why this process cannot make emulated hosts; None if it can."""
    try:
        with EmulatedHosts():
            return None
    except InputError as error:
        return str(error)


def enter(tenant: int) -> None:
    """Take this process, which has one thread, to the host of ``tenant`` for good; its working directory is kept."""
    directory = Path.cwd()
    for fd in [os.open(f"/proc/{tenant}/ns/{kind}", os.O_RDONLY) for kind in _KINDS]:
        _setns(fd)
    os.chdir(directory)


def _gpus_of_second() -> str:
    """What makes the second half of the GPUs the first that host1 sees. It sees all: peer memory needs that."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(count)]
    half = (len(gpus) + 1) // 2
    order = ",".join(gpus[half:] + gpus[:half])
    return f"export CUDA_VISIBLE_DEVICES={order}\n" if len(gpus) > 1 else ""


def _setns(fd: int) -> None:
    """Enter the namespace that ``fd`` is open on, and close it. (os.setns came with Python 3.12.)"""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if libc.setns(fd, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(fd)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.engines.emulated_hosts", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--gbit", type=float, help="rate of the network between the hosts in Gbit/s (default: no limit)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="runs on host0; `ssh host1 ...` reaches the other")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command; for example: hostname")
    if options.gbit is not None and not options.gbit > 0:
        parser.error(f"--gbit {options.gbit}: must be above 0")
    if os.geteuid():  # root of a user namespace may do all of it
        inside = [sys.executable, "-m", "bench.engines.emulated_hosts", *arguments]
        os.execvp("unshare", ["unshare", "--user", "--map-root-user", *inside])
    try:
        with EmulatedHosts(options.gbit) as hosts:
            return _run_to_its_end(hosts.command(0, command))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run_to_its_end(command: Sequence[str]) -> int:
    """Its exit code. A SIGTERM goes on to it, also one that comes while it starts."""
    process: subprocess.Popen[bytes] | None = None
    asked = False

    def end(*_: object) -> None:
        nonlocal asked
        asked = True
        if process is not None:
            process.terminate()

    signal.signal(signal.SIGTERM, end)
    process = subprocess.Popen(command)
    if asked:
        process.terminate()
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the command got it too, and ends in its own way


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
