"""Stand-in for `mooncake.engine`: a prefill and a decode server on one host hand over the KV cache on the CPU.

It has what SGLang's MooncakeTransferEngine calls. Instead of RDMA it writes straight into the other process's memory
(process_vm_writev), and that process's id stands for the port of a session.
"""

import ctypes
import os
import sys
import types

_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)
_IOV_MAX = 1024


class _Part(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class TransferEngine:
    """Return values as mooncake's: 0, or below 0 for an error."""

    def __init__(self):
        self._libc = ctypes.CDLL(None, use_errno=True)
        # prefill.py otherwise reads page numbers through pinned memory and CUDA events, which the CPU has not.
        from sglang.srt.disaggregation.mooncake import conn

        conn.MooncakeKVSender.supports_host_tensor_indices = False

    def initialize(self, hostname, metadata_server, protocol, device_name):
        # Where the kernel lets only parents write into a process (Yama), everybody may write into this one. Without
        # Yama the call fails, and nothing is needed.
        self._libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
        return 0

    def get_rpc_port(self):
        return os.getpid()

    def get_engine(self):
        return self

    def register_memory(self, address, length):
        return 0

    def unregister_memory(self, address):
        return 0

    def batch_register_memory(self, addresses, lengths):
        return 0

    def batch_unregister_memory(self, addresses):
        return 0

    def send_probe(self, session):
        return 0 if os.path.isdir(f"/proc/{_process(session)}") else -1

    def transfer_sync_write(self, session, source, target, length):
        return self.batch_transfer_sync_write(session, [source], [target], [length])

    def batch_transfer_sync_write(self, session, sources, targets, lengths):
        for begin in range(0, len(lengths), _IOV_MAX):
            size = lengths[begin : begin + _IOV_MAX]
            ours, theirs = (
                (_Part * len(size))(*zip(addresses[begin : begin + _IOV_MAX], size, strict=True))
                for addresses in (sources, targets)
            )
            written = self._libc.process_vm_writev(_process(session), ours, len(size), theirs, len(size), 0)
            if written != sum(size):
                return -1
        return 0


def _process(session):
    return int(session.rsplit(":", 1)[1])


def install():
    package, engine = types.ModuleType("mooncake"), types.ModuleType("mooncake.engine")
    package.__path__ = []
    package.engine = engine
    engine.TransferEngine = TransferEngine
    sys.modules.update({"mooncake": package, "mooncake.engine": engine})
