"""A server that uses none of this package's flags does not load what only they need."""

import subprocess
import sys


def test_checking_flags_loads_neither_numba_nor_scipy() -> None:
    code = (
        "import sys\n"
        "from sglang_eplb_affinity.sglang_hooks import arguments, calls\n"
        "print({'numba', 'scipy', 'prometheus_client'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "set()"
