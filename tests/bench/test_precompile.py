"""Kernels compiled ahead: the list names functions of the installed SGLang, and the architecture is checked."""

import importlib.metadata
import subprocess
import sys

import pytest

from bench.gpu import precompile
from bench.harness.engine import ROOT, cpu_environment

BIND = """
import inspect, json, sys
from bench.gpu.precompile import KERNELS, kernel_function
for module, function, arguments in KERNELS:
    found = kernel_function(module, function)
    if found is not None:
        inspect.signature(inspect.unwrap(found)).bind(*arguments)
    print(function if found is not None else "none")
"""


def test_the_installed_sglang_has_the_kernels_that_are_compiled_ahead() -> None:
    environment = {"PATH": "/usr/bin:/bin", **cpu_environment(1)}
    done = subprocess.run(
        [sys.executable, "-c", BIND], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    gone = {"dsv3_router_gemm_module"} if importlib.metadata.version("sglang") == "0.5.23" else set()
    names = [function for _, function, _ in precompile.KERNELS]
    assert done.stdout.split() == ["none" if name in gone else name for name in names]


@pytest.mark.parametrize("arch", ["90", "9", "sm_90", "9.0x", ""])
def test_a_wrong_architecture_is_one_line_and_exit_code_2(arch, capsys) -> None:
    assert precompile.main(["--arch", arch]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --arch {arch}: not MAJOR.MINOR") and error.count("\n") == 1
