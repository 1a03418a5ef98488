"""The Triton kernel, interpreted on the CPU, equals the torch reference.

Needs Triton, which CPU environments lack (`pip install --target FOLDER triton==3.6.0`, PYTHONPATH=FOLDER), and
TRITON_INTERPRET=1. On a GPU tests/device/kernel/test_gpu.py runs the same cases compiled.
"""

import importlib.util
import os

import pytest

from tests.device.kernel.cases import CASES
from tests.device.kernel.random_case import Case, run

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_the_reference(case: Case) -> None:
    run(case, "cpu")
