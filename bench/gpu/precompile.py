"""Compile SGLang's own small CUDA kernels (tvm-ffi) that the GPU comparisons' servers use, before a GPU is paid for.

    python -m bench.gpu.precompile [--arch 9.0a]

Without it the first server compiles them one after another as it meets them, which takes minutes. They are found by
what they were compiled from, so any machine with nvcc and the same SGLang and apache-tvm-ffi may compile them, also one
without a GPU: pack the folder that the last line names (~/.cache/tvm-ffi; SGLang 0.5.23: ~/.cache/sglang/jit) and
unpack it in the home folder of the GPU host. What is not in the list is compiled there as ever. DeepGEMM's and Triton's
kernels need a GPU; bench/gpu/measure.sh brings them back.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from bench.harness.engine import STAND_INS

_FP8 = ("bfloat16", "float8_e4m3fn", 128)
# Module below sglang.kernels.ops (behind `|` that of 0.5.23, where it has one), function, arguments (`bf16` and the
# like are torch dtypes): of the models that deepseek_shaped.py and random_moe.py make.
KERNELS: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("activation.activation", "activation_module", ("bfloat16",)),
    ("attention.clamp_position", "_jit_clamp_position_module", ("int64",)),
    ("attention.concat_mla", "_jit_concat_mla_k_module", ()),
    ("attention.dsv4.moe|moe.dsv4", "_jit_mask_topk_module", ()),
    ("attention.rope", "_jit_fused_rope_module", (False, 64, "bfloat16", "bfloat16")),
    ("attention.rope", "_jit_fused_rope_module", (True, 128, "bfloat16", "bfloat16")),
    ("gemm.dsv3_router_gemm|", "dsv3_router_gemm_module", (256, 7168, True, True)),
    ("kvcache.set_mla_kv_buffer", "set_mla_kv_buffer_module", (1024, 128, True)),
    ("layernorm.norm", "_jit_qknorm_module", (128, "bfloat16")),
    ("quantization.per_token_group_quant", "_jit_module", (*_FP8, False, False, True, False, False, True)),
    ("quantization.per_token_group_quant", "_jit_module", (*_FP8, False, True, True, False, False, True)),
)
TOOLKIT = Path("/usr/local/cuda")
ARCH = re.compile(r"(\d+)\.(\d)([af]?)")


def compile_kernel(number: int, arch: str | None) -> str:
    """One of KERNELS; returns its line."""
    import torch

    if (
        TOOLKIT.is_dir()
    ):  # tvm-ffi would take the folder above whatever nvcc is first on PATH, and link with its library
        os.environ.setdefault("CUDA_HOME", str(TOOLKIT))
    module, function, arguments = KERNELS[number]
    if arch:
        _pretend(arch)
    build = kernel_function(module, function)
    if build is None:
        return f"{function}{arguments}: this SGLang has none"
    given = [getattr(torch, a) if isinstance(a, str) else a for a in arguments]
    began = time.monotonic()
    try:
        build(*given)
        result = "compiled or there"
    except Exception as error:
        result = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return f"{function}{arguments}: {result}, {time.monotonic() - began:.1f} s"


def kernel_function(module: str, function: str) -> Callable[..., object] | None:
    """Of the installed SGLang; None where it is said to have none. Raises ModuleNotFoundError for another."""
    *earlier, last = module.split("|")
    for name in earlier:
        with suppress(ModuleNotFoundError):
            found: Callable[..., object] = getattr(import_module(f"sglang.kernels.ops.{name}"), function)
            return found
    return getattr(import_module(f"sglang.kernels.ops.{last}"), function) if last else None


def _pretend(arch: str) -> None:
    """Make SGLang compile for ``arch`` whatever GPU there is."""
    from sglang.kernels.jit.utils import arch as target

    match = ARCH.fullmatch(arch)
    assert match is not None
    target._init_jit_cuda_arch_once()
    target._CUDA_ARCH = target.ArchInfo(int(match[1]), int(match[2]), match[3])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.precompile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", help="CUDA architecture, such as 9.0a for H100 and H200 (default: of this GPU)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.arch is not None and not ARCH.fullmatch(options.arch):
        print(f"error: --arch {options.arch}: not MAJOR.MINOR with a or f behind it, such as 9.0a", file=sys.stderr)
        return 2
    if find_spec("triton") is None:  # SGLang imports with what stands in for it and others on the CPU engine
        sys.path.insert(0, str(STAND_INS))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(STAND_INS), os.environ.get("PYTHONPATH", "")]))
    count = len(KERNELS)
    with ProcessPoolExecutor(min(options.jobs, count), multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(compile_kernel, range(count), [options.arch] * count):
            print(line, flush=True)
    for variable, usual in (("TVM_FFI_CACHE_DIR", "~/.cache/tvm-ffi"), ("SGLANG_JIT_CACHE_DIR", "~/.cache/sglang/jit")):
        folder = Path(os.environ.get(variable, usual)).expanduser()
        if kernels := list(folder.rglob("*.so")):
            print(f"{folder}: {len(kernels)} kernels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
