"""The planner process: plans rounds for the rank that started it, over its standard input and output.

    python -m sglang_eplb_affinity.rebalance.planner_main

Messages are pickles (made by our own parent, nobody else can write to the pipe) behind their length in 8 bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import pickle
import signal
import struct
import sys
import traceback
from typing import BinaryIO

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.planner import warm_up
from sglang_eplb_affinity.rebalance.plan_round import PlanReply, PlanRequest, PlanSettings, plan_round

READY = b"ready"
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
HEADER = struct.Struct("<Q")


def write_message(stream: BinaryIO, payload: bytes) -> None:
    stream.write(HEADER.pack(len(payload)))
    stream.write(payload)
    stream.flush()


def read_message(stream: BinaryIO) -> bytes | None:
    """None at the end of the stream."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (length,) = HEADER.unpack(header)
    payload = stream.read(length)
    return payload if len(payload) == length else None


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Warm up with the settings that come first, say so, then answer until the parent closes the pipe."""
    first = read_message(requests)
    if first is None:
        return
    settings: PlanSettings = pickle.loads(first)
    warm_up(settings.planner)
    write_message(replies, READY)
    while (payload := read_message(requests)) is not None:
        write_message(replies, pickle.dumps(answer(pickle.loads(payload)), protocol=5))


def answer(request: PlanRequest) -> PlanReply:
    try:
        return plan_round(request)
    except Exception as error:  # whatever goes wrong, the server goes on with the map it has
        if not isinstance(error, InputError):
            traceback.print_exc()
        return PlanReply("failed", f"{type(error).__name__}: {error}")


def main() -> None:
    # Anything that prints must not get between the messages.
    replies = io.FileIO(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    os.nice(5)  # serving comes first
    _end_with_parent()
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(sys.stdin.buffer, io.BufferedWriter(replies))


def _end_with_parent() -> None:
    """A parent that is killed takes this process along even while it plans (Linux; elsewhere the closed pipe does)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
