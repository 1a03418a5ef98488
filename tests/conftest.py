"""Tests marked `gpu` are skipped, the reason printed, where there is no GPU; `make test` runs two files at a time."""

import os

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start servers take minutes: they go first, so that the two processes end at about the same time."""
    items.sort(key=lambda item: item.path.parent.name != "server" and item.path.name != "test_end_to_end.py")


def first_port(base: int) -> int:
    """Each of the processes that run tests at the same time has ports of its own."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return base + 1000 * int(worker)
