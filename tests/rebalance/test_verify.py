"""The proof that every slot holds the expert that the map says: it sees a slot with another expert's weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bench.figures.rebalance_log import WRONG_WEIGHTS, parse_log
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.rebalance import verify
from sglang_eplb_affinity.rebalance.weights import LayerWeights


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def weights_of(*rows: int) -> tuple[torch.Tensor, dict[int, LayerWeights]]:
    """One layer; slot i is filled with rows[i]."""
    values = torch.tensor(rows, dtype=torch.uint8)[:, None].repeat(1, 16)
    return values, {0: LayerWeights((values,))}


def expert_map(*experts: int) -> ExpertMap:
    return ExpertMap(np.array([experts], dtype=np.int32), 3)


@pytest.mark.usefixtures("group")
def test_a_slot_with_another_experts_weights_is_found(caplog: pytest.LogCaptureFixture) -> None:
    values, weights = weights_of(5, 6, 7, 5)
    verifier = verify.WeightVerifier(weights, expert_map(0, 1, 2, 0), 0, 1, (), None)
    with caplog.at_level(logging.INFO):
        assert verifier.check(expert_map(0, 1, 2, 0)) == 0
    assert not parse_log(caplog.text).wrong_weights
    values[3] = values[1]
    assert verifier.check(expert_map(0, 1, 2, 1)) == 0
    assert verifier.check(expert_map(0, 1, 2, 0)) == 1
    assert parse_log(caplog.text).wrong_weights == 1 and verify.WRONG == WRONG_WEIGHTS
    values[0, :8], values[0, 8:] = 6, 5
    assert verifier.check(expert_map(0, 1, 2, 1)) == 1


@pytest.mark.usefixtures("group")
def test_replicas_with_dummy_weights_are_all_their_experts() -> None:
    values, weights = weights_of(5, 6, 7, 9, 6)  # slots 0 and 3 are expert 0's, each with weights of its own
    verifier = verify.WeightVerifier(weights, expert_map(0, 1, 2, 0, 1), 0, 1, (), None)
    assert verifier.check(expert_map(0, 1, 2, 0, 1)) == 0
    values[1] = values[3]
    assert verifier.check(expert_map(0, 0, 2, 0, 1)) == 0 and verifier.check(expert_map(0, 1, 2, 0, 1)) == 1
