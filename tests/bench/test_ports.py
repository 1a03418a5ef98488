"""Ports that a server is told to bind once it has imported."""

import socket

import pytest

from bench.harness import ports


def test_a_port_is_free_nobody_elses_and_none_that_a_connection_may_take() -> None:
    found = [ports.free_port() for _ in range(50)]
    assert len(set(found)) == 50
    for _ in range(50):  # what a kernel hands out to whoever asks for any
        with socket.socket() as any_port:
            any_port.bind(("127.0.0.1", 0))
            assert any_port.getsockname()[1] not in ports.RANGE
    for port in found:
        with socket.socket() as server:
            server.bind(("", port))


def test_a_port_in_use_is_passed_over_and_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ports.free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        monkeypatch.setattr(ports, "RANGE", range(first, first + 1))
        monkeypatch.setattr(ports, "_given", set())
        with pytest.raises(OSError, match=f"no free port from {first} to {first}"):
            ports.free_port()
