"""The flags that every server of the GPU comparisons has."""

from __future__ import annotations


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
