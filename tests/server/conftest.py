import importlib.metadata
import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.engines.cpu_engine import tiny_models
from bench.engines.emulated_hosts import EmulatedHosts
from sglang_eplb_affinity.domain.errors import InputError
from tests.conftest import first_port
from tests.server.harness import NUM_PROMPTS, OUTPUT_TOKENS, ServerCase, prompts, serve


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


# EPLB_AFFINITY_TEST_PORT: the first to try, for several test runs on one machine.
_PORTS = itertools.count(first_port(int(os.environ.get("EPLB_AFFINITY_TEST_PORT", "31300"))), 7)


@pytest.fixture
def port() -> int:
    return free_port()


def free_port() -> int:
    """A free port; SGLang takes more of them above it."""
    for candidate in _PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", candidate)):
                return candidate
    raise AssertionError


@pytest.fixture
def hosts() -> Iterator[EmulatedHosts | None]:
    """Two hosts; None where this machine cannot emulate them, and the server then runs on this one."""
    with ExitStack() as stack:
        try:
            emulated = stack.enter_context(EmulatedHosts())
        except InputError:  # tests/bench/test_emulated_hosts.py is skipped then, and says why
            emulated = None
        yield emulated


@pytest.fixture(scope="session")
def reference(models: Path, tmp_path_factory: pytest.TempPathFactory):
    """Outputs without EPLB, by model and parallel sizes; each server is started once."""

    @cache
    def outputs(model: str, ep: int, dp_attention: bool) -> list[list[int]]:
        case = ServerCase(model, ep, dp_attention=dp_attention)
        folder = tmp_path_factory.mktemp(case.name)
        dumps = {"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(folder)}
        with serve(models / model, case.flags, folder / "log", port=free_port(), ranks=ep, **dumps) as server:
            server.post("/start_expert_distribution_record")
            results = server.generate(prompts(NUM_PROMPTS))
            server.post("/stop_expert_distribution_record")
            server.post("/dump_expert_distribution_record")
        check_dump(folder, results)
        return [result["output_ids"] for result in results]

    return outputs


def check_dump(folder: Path, results: list[dict]) -> None:
    """Every token that went through the experts is recorded once: prompts, and all outputs but the last token."""
    (path,) = folder.glob("expert_distribution_recorder_*.pt")
    record = torch.load(path, weights_only=True)["affinity"]
    tokens = sum(result["meta_info"]["prompt_tokens"] + OUTPUT_TOKENS - 1 for result in results)
    counts, matrix = record["counts"], record["coactivation"]
    moe_layers = counts.any(1)
    top_k = record["tokens"].shape[2]
    assert moe_layers.sum() >= 3
    # A pass that was scheduled before a request's end is seen may run one token more for it.
    assert (counts[moe_layers].sum(1) >= tokens * top_k).all()
    assert (counts[moe_layers].sum(1) <= (tokens + len(results)) * top_k).all()
    assert len(set(counts[moe_layers].sum(1).tolist())) == 1
    assert (matrix == matrix.transpose(1, 2)).all()
    assert (matrix.sum(2) == counts * (top_k - 1)).all()
    rows = record["tokens"][moe_layers]
    assert ((rows[:, :, 0] >= 0).sum(1) == counts[moe_layers].sum(1) // top_k).all()
    ids = rows[0][rows[0, :, 0] >= 0].numpy()
    assert (np.bincount(ids.ravel(), minlength=counts.shape[1]) == counts[moe_layers][0].numpy()).all()
