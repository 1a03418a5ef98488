import importlib.metadata
import itertools
import socket
from pathlib import Path

import pytest

from bench.cpu_engine import tiny_models


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/server" in item.path.as_posix():
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session", autouse=True)
def _needs_patched_sglang() -> None:
    try:
        importlib.metadata.distribution("sglang")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("SGLang is not installed; run `make setup`")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.build(folder)
    return folder


_PORTS = itertools.count(31300, 7)


@pytest.fixture
def port() -> int:
    """A free port; SGLang takes more of them above it."""
    for candidate in _PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", candidate)):
                return candidate
    raise AssertionError
