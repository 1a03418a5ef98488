"""Ports for what binds them later."""

from __future__ import annotations

import random
import socket

# Below those that kernels hand out to whoever asks for any (32768 on by default): one of those may be gone, to a
# connection or to another server's rank, before the process that was told it has imported enough to bind it.
RANGE = range(14000, 22000)  # SGLang looks for its own from 22000 on
_given: set[int] = set()


def free_port() -> int:
    """A free port that this process gives to nobody else. For what a server would look for by itself: of several that
    start together, two would find the same."""
    for port in random.sample(RANGE, len(RANGE)):
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise OSError(f"no free port from {RANGE.start} to {RANGE.stop - 1}")
