"""What our hooks make of SGLang's own objects: batches as it cuts them, weights as it loads them."""

import importlib.metadata

import pytest

from tests.server.harness import found_by

pytestmark = pytest.mark.skipif(
    importlib.metadata.version("sglang") != "0.5.23", reason="the checks name objects as SGLang 0.5.23 does"
)


@pytest.fixture(scope="module")
def found() -> dict:
    return found_by("check_objects")


def test_ranks_that_share_a_pass_sample_its_tokens_evenly(found: dict) -> None:
    """Attention over eight ranks in front of an all-to-all, eager passes and captured ones."""
    parts = found["parts"]
    assert parts["counted every token"] and parts["layers agree"] and parts["rows"] == 1024
    first, expected = parts["first percent"]
    assert first <= 4 * expected + 4
    half, expected_half = parts["first half"]
    assert abs(half - expected_half) < 0.04  # four standard deviations
    assert min(parts["rows of ranks"]) > 80


def test_passes_of_low_latency_mode_are_told_as_sglang_tells_its_dispatcher(found: dict) -> None:
    assert found["low latency"] == [False, True]


@pytest.mark.parametrize("way", ["disk", "tensor", "distributed"])
def test_new_weights_go_where_the_model_has_its_experts(found: dict, way: str) -> None:
    """The target's by the map in force; a draft model's in their own order, whatever the target's map says."""
    assert found["draft"][f"target {way}"] == [0, 3, 2]
    assert found["draft"][f"draft {way}"][0] == 3


def test_the_map_of_the_ranks_that_live_when_others_are_gone(found: dict) -> None:
    """As SGLang's elastic EP says, through its manager and its weight updater; nothing waits for who is gone."""
    gone = found["gone"]
    right = {"agree": True, "gone slots": [0], "names gone": [], "experts": [8, 8], "valid": True, "wrong": 0}
    figures = {name: value for name, value in gone.items() if isinstance(value, dict)}
    assert len(figures) == 16 and all(value for value in gone.values())
    for name, value in figures.items():
        assert {key: value[key] for key in right} == right, name
    # Of the three experts that rank 2 had, two in each layer were nowhere else; the next round asks no disk.
    for rule in ("static", "cover", "cover_balanced", "primary", "primary+1"):
        assert 4 <= figures[f"{rule} fault"]["from disk"] == figures[f"{rule} next"]["from disk"]
