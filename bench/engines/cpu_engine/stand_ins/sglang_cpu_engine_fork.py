"""A fork server that is forked from SGLang's main process, which has imported everything that the others need."""

from __future__ import annotations

import os
import socket
import sys
import threading
from multiprocessing import connection, forkserver, resource_tracker


class ForkedForkServer(forkserver.ForkServer):
    """The standard library's fork server is another interpreter, which would import SGLang once more (10 s of a core).

    It is forked when the first process is started. Processes that start others (data parallelism) inherit its address
    and use it too.
    """

    def ensure_running(self) -> None:
        with self._lock:
            resource_tracker.ensure_running()
            if self._forkserver_address is not None:
                return
            with socket.socket(socket.AF_UNIX) as listener:
                address = connection.arbitrary_address("AF_UNIX")
                listener.bind(address)
                os.chmod(address, 0o600)
                listener.listen()
                # All clients own the writing end; when the last of them ends, so does the fork server.
                alive_r, alive_w = os.pipe()
                self._forkserver_address, self._forkserver_alive_fd = address, alive_w
                sys.stdout.flush()
                sys.stderr.flush()
                self._forkserver_pid = os.fork()
                if self._forkserver_pid == 0:
                    self._serve(listener.fileno(), alive_r, alive_w)
                os.close(alive_r)

    def _serve(self, listener: int, alive_r: int, alive_w: int) -> None:
        self._lock = threading.Lock()  # the inherited one is held
        os.close(alive_w)
        try:
            forkserver.main(listener, alive_r, [])
        finally:
            os._exit(0)


def install() -> None:
    """SGLang's processes come from this fork server from now on."""
    server = ForkedForkServer()
    forkserver._forkserver = server
    for name in ("ensure_running", "get_inherited_fds", "connect_to_new_process", "set_forkserver_preload"):
        setattr(forkserver, name, getattr(server, name))
