"""Tests marked `gpu` are skipped, the reason printed, where there is no GPU; `make test` runs two groups at a time."""

import os

import pytest
import torch

# References of the one serve the other, and each takes a server.
_TOGETHER = {"test_outputs.py": "outputs", "test_static_maps.py": "outputs"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """pytest-xdist gives tests of one group to one process: those of a file, which share fixtures."""
    for item in items:
        name = _TOGETHER.get(item.path.name, item.nodeid.split("::")[0])
        item.add_marker(pytest.mark.xdist_group(name))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")


def first_port(base: int) -> int:
    """Each of the processes that run tests at the same time has ports of its own."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return base + 1000 * int(worker)
