"""Kernels compiled ahead: the list names functions of the installed SGLang, and the architecture is checked."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

from bench.gpu import precompile
from bench.harness.engine import ROOT, cpu_environment

BIND = """
import inspect, json, sys
from importlib import import_module
for module, function, arguments in json.loads(sys.argv[1]):
    found = getattr(import_module(f"sglang.kernels.ops.{module}"), function)
    inspect.signature(inspect.unwrap(found)).bind(*arguments)
    print(function)
"""


@pytest.mark.skipif(
    importlib.metadata.version("sglang") != "0.5.17", reason="the bundle for GPU hosts has SGLang 0.5.17"
)
def test_the_installed_sglang_has_the_kernels_that_are_compiled_ahead() -> None:
    command = [sys.executable, "-c", BIND, json.dumps(precompile.KERNELS)]
    environment = {"PATH": "/usr/bin:/bin", **cpu_environment(1)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [function for _, function, _ in precompile.KERNELS]


@pytest.mark.parametrize("arch", ["90", "9", "sm_90", "9.0x", ""])
def test_a_wrong_architecture_is_one_line_and_exit_code_2(arch, capsys) -> None:
    assert precompile.main(["--arch", arch]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --arch {arch}: not MAJOR.MINOR") and error.count("\n") == 1
