"""Greedy outputs do not change with placement, over at least 5 rebalances that moved experts.

By default a set of servers in which every pair of settings occurs; all combinations with EPLB_AFFINITY_FULL_MATRIX=1
(`make test-matrix`). The reference is the server without EPLB with the same parallel sizes, which at the same time
shows that the affinity recorder counts every token once.
"""

import itertools
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.server.harness import OUTPUT_TOKENS, ServerCase, prompts, serve

MODELS = ("qwen3moe", "dsv3")
NUM_PROMPTS = 28

# Eight runs of five factors of two levels in which every pair of levels occurs, on four references only.
PAIRWISE = [
    ("qwen3moe", 2, 0, False, "deepseek"),
    ("qwen3moe", 2, 4, False, "affinity"),
    ("qwen3moe", 4, 0, True, "affinity"),
    ("qwen3moe", 4, 4, True, "deepseek"),
    ("dsv3", 2, 0, True, "affinity"),
    ("dsv3", 2, 4, True, "deepseek"),
    ("dsv3", 4, 0, False, "deepseek"),
    ("dsv3", 4, 4, False, "affinity"),
]
ALL = list(itertools.product(MODELS, (2, 4), (0, 4), (False, True), ("deepseek", "affinity")))
CASES = [ServerCase(*case) for case in (ALL if os.environ.get("EPLB_AFFINITY_FULL_MATRIX") else PAIRWISE)]


def test_the_default_cases_cover_every_pair_of_settings() -> None:
    for a, b in itertools.combinations(range(5), 2):
        assert len({(case[a], case[b]) for case in PAIRWISE}) == 4


@pytest.fixture(scope="module")
def reference(models: Path, tmp_path_factory: pytest.TempPathFactory):
    """Outputs without EPLB, by model and parallel sizes; each server is started once."""
    ports = itertools.count(31900, 11)

    @cache
    def outputs(model: str, ep: int, dp_attention: bool) -> list[list[int]]:
        case = ServerCase(model, ep, dp_attention=dp_attention)
        folder = tmp_path_factory.mktemp(case.name)
        dumps = {"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(folder)}
        with serve(models / model, case.flags, folder / "log", port=next(ports), ranks=ep, **dumps) as server:
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_equal_those_without_eplb(case: ServerCase, reference, models: Path, tmp_path: Path, port: int) -> None:
    expected = reference(case.model, case.ep, case.dp_attention)
    with serve(models / case.model, case.flags, tmp_path / "log", port=port, ranks=case.ep) as server:
        outputs = [result["output_ids"] for result in server.generate(prompts(NUM_PROMPTS))]
        log = server.rebalances()
    assert log.moved >= 5, f"only {log.moved} of {len(log.rebalances)} rebalances moved experts"
    assert {rebalance.algorithm for rebalance in log.rebalances} == {case.algorithm}
    wrong = [index for index, pair in enumerate(zip(outputs, expected, strict=True)) if pair[0] != pair[1]]
    assert not wrong, f"outputs of prompts {wrong} changed over {log.moved} rebalances"
