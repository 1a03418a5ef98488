"""Kernels compiled ahead: the list names functions of the installed SGLang, and the architecture is checked."""

import inspect
from importlib import import_module

import pytest

from bench.gpu import precompile


@pytest.mark.parametrize(("module", "function", "arguments"), precompile.KERNELS, ids=lambda value: str(value))
def test_the_installed_sglang_has_the_kernels_that_are_compiled_ahead(module, function, arguments) -> None:
    found = getattr(import_module(f"sglang.kernels.ops.{module}"), function)
    inspect.signature(inspect.unwrap(found)).bind(*arguments)


@pytest.mark.parametrize("arch", ["90", "9", "sm_90", "9.0x", ""])
def test_a_wrong_architecture_is_one_line_and_exit_code_2(arch, capsys) -> None:
    assert precompile.main(["--arch", arch]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --arch {arch}: not MAJOR.MINOR") and error.count("\n") == 1
