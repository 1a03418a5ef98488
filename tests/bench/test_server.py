"""Servers over several hosts: their commands, and that none is left behind."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bench.harness.engine import ROOT, Engine
from bench.harness.ports import free_port
from bench.harness.profile import Profile, ServerConfig
from bench.harness.server import PORT_STEP, Server, ServerFailed, commands_of_hosts
from bench.harness.side_by_side import give_turn
from sglang_eplb_affinity.domain.errors import InputError

CONFIG = ServerConfig(model="m", ranks=16, other_hosts=("n1", "n2"), dist_init_addr="n0:5000")
HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_every_host_gets_the_same_command_and_its_rank() -> None:
    engine = Engine("m", {"NCCL_DEBUG": "WARN x"})
    first, second, third = commands_of_hosts(CONFIG, ["python", "-m", "serve"], engine, place=2)
    address = f"n0:{5000 + 2 * PORT_STEP}"
    assert first == ["python", "-m", "serve", "--nnodes", "3", "--dist-init-addr", address, "--node-rank", "0"]
    assert second[:-1] == [*CONFIG.remote_shell, "n1"] and third[-2] == "n2"
    assert second[-1] == f"cd {ROOT} && exec env 'NCCL_DEBUG=WARN x' {' '.join(first[:-1])} 1"
    assert third[-1].endswith("--node-rank 2")
    assert commands_of_hosts(replace(CONFIG, other_hosts=()), ["x"], engine) == [["x"]]


def test_other_hosts_need_an_address() -> None:
    text = 'title = "t"\n[server]\nmodel = "m"\nranks = 2\nother_hosts = ["n1"]\n'
    with pytest.raises(InputError, match="other_hosts need dist_init_addr"):
        Profile.parse(text + "[load]\noutput_tokens = 8\n[load.requests]\n4 = 40\n", name="p", source="p.toml")


def test_processes_of_other_hosts_start_and_end_with_the_server(tmp_path: Path) -> None:
    import os

    port, mark = free_port(), "12345.678"
    engine = Engine("m", dict(os.environ))
    # A remote shell that forgets the host and runs the text here.
    config = replace(
        CONFIG, remote_shell=(sys.executable, "-c", "import os, sys; os.execvp('sh', ['sh', '-c', sys.argv[2]])")
    )
    _, *others = commands_of_hosts(config, ["sh", "-c", f"echo $$ >> {tmp_path}/pids; sleep {mark} # "], engine)
    command = [sys.executable, "-c", HEALTHY, str(port)]
    with Server(command, engine, tmp_path / "a.log", port, 60, others) as server:
        deadline = time.monotonic() + 30
        while len(pids := _pids(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.alive and len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    broken = Server([sys.executable, "-c", "exit(3)"], engine, tmp_path / "b.log", free_port(), 60, others)
    with pytest.raises(ServerFailed), broken:
        pass
    assert not any(psutil.pid_exists(pid) for pid in _pids(tmp_path))


def _pids(folder: Path) -> list[int]:
    file = folder / "pids"
    return [int(line) for line in file.read_text().split()] if file.is_file() else []


def test_only_the_server_whose_turn_it_is_runs(tmp_path: Path) -> None:
    import os

    engine = Engine("m", dict(os.environ))
    ports = [free_port() for _ in range(2)]
    servers = {
        name: Server([sys.executable, "-c", HEALTHY, str(port)], engine, tmp_path / f"{name}.log", port, 60)
        for name, port in zip("ab", ports, strict=True)
    }
    with servers["a"] as first, servers["b"] as second:
        for name in ("a", "b", "a"):
            give_turn(servers, name)
            assert servers[name].healthy()
            other = servers["b" if name == "a" else "a"].process
            assert other is not None
            deadline = time.monotonic() + 10
            while (state := psutil.Process(other.pid).status()) != psutil.STATUS_STOPPED:
                assert time.monotonic() < deadline, state
    assert not first.alive and not second.alive
