"""What the GPU comparisons have in common: flags of every server, and options that say when to measure."""

from __future__ import annotations

import argparse
import math
import signal
import time
from pathlib import Path
from types import FrameType

from bench.harness.hosts import OtherHosts, other_hosts
from sglang_eplb_affinity.domain.errors import InputError

# Servers that start beside each other: what one has not taken yet looks free to the others, so the pool is limited by
# --max-total-tokens and not by a share of what is free.
SHARED_MEMORY = ("--mem-fraction-static", "0.99")
HOLD_SECONDS = 300.0


def deepep_flags(gpus: int) -> list[str]:
    """DeepEP over ``gpus`` GPUs of one host with data-parallel attention, and only kernels that bundle.sh packs."""
    flags = ["--tp", str(gpus), "--ep", str(gpus), "--dp", str(gpus), "--enable-dp-attention"]
    flags += ["--moe-a2a-backend", "deepep", "--moe-runner-backend", "deep_gemm", "--attention-backend", "triton"]
    flags += ["--sampling-backend", "pytorch", "--grammar-backend", "none", "--disable-custom-all-reduce"]
    return [
        *flags,
        "--enforce-disable-flashinfer-allreduce-fusion",
        "--disable-prefill-cuda-graph",
        "--disable-radix-cache",
    ]


def cpu_flags() -> list[str]:
    """The CPU engine on two ranks: every comparison can be rehearsed where there is no GPU (its times mean nothing)."""
    flags = ["--device", "cpu", "--tp", "2", "--ep", "2", "--attention-backend", "torch_native", "--disable-cuda-graph"]
    flags += ["--max-total-tokens", "8192", "--context-length", "2048", "--dtype", "float32"]
    return [*flags, "--max-running-requests", "16", "--disable-radix-cache"]


def need_gpus(program: str, gpus: int = 1) -> None:
    """Raise InputError where there are fewer, or none is asked for."""
    import torch

    found = torch.cuda.device_count()
    if not found:
        raise InputError(f"{program}: needs a CUDA GPU, but PyTorch sees none")
    if not 0 < gpus <= found:
        raise InputError(f"{program}: --gpus {gpus}, but this host has {found}")


def wait_for(path: Path | None, seconds: float = HOLD_SECONDS) -> None:
    """Return once ``path`` exists (None: at once), or after ``seconds``, saying so."""
    deadline = time.monotonic() + seconds
    while path is not None and not path.exists():
        if time.monotonic() > deadline:
            print(f"{path.name} did not come within {seconds:.0f} s; going on", flush=True)
            return
        time.sleep(0.2)


def timing_options(parser: argparse.ArgumentParser, of: str) -> None:
    """--seconds, --end-at and --hold, for what is measured on rented machines."""
    parser.add_argument("--seconds", type=float, default=3600, help=f"of {of}, at most")
    parser.add_argument("--end-at", type=float, default=math.inf, help="no load goes on after this Unix time")
    parser.add_argument("--hold", type=Path, help="measure once this file exists; servers start meanwhile")


def host_options(parser: argparse.ArgumentParser) -> None:
    """--other-hosts and --dist-init-addr, for :func:`hosts_of`."""
    parser.add_argument(
        "--other-hosts", default="", help="NAME,...: each reached by ssh, this folder in the same place"
    )
    parser.add_argument("--dist-init-addr", default="", help="HOST:PORT of this host, as the others reach it")


def hosts_of(options: argparse.Namespace, ranks: int) -> OtherHosts:
    """What :func:`host_options` were given. Raises InputError unless the ranks divide over the hosts."""
    return other_hosts(options.other_hosts, options.dist_init_addr, ranks)


def end_cleanly() -> None:
    """SIGTERM stops the servers on the way out; else they would go on holding the GPUs."""
    signal.signal(signal.SIGTERM, _terminate)


def seconds_left(options: argparse.Namespace) -> float:
    return float(min(options.seconds, options.end_at - time.time()))


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
