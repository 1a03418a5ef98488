"""Every target TopK looks its placement up, whatever its model hands over; draft layers keep their own order."""

import importlib.metadata

import pytest

from tests.server.harness import found_by

pytestmark = pytest.mark.skipif(
    importlib.metadata.version("sglang") != "0.5.17", reason="SGLang mended this itself after 0.5.17"
)


@pytest.fixture(scope="module")
def found() -> dict:
    return found_by("check_dispatch_info")


def test_layers_of_the_target_are_numbered_by_their_experts_if_need_be(found: dict) -> None:
    # The third block is beyond the placement, as extra layers of a target may be.
    assert found["target"] == [[0, False], [1, False], [None, False]]
    assert "does not say which layer" in found["unnumbered"]


def test_draft_layers_are_in_no_placement(found: dict) -> None:
    assert found["draft"] == [[None, True]] * 3
    # While a draft is loaded each expert goes to the slot of its own number; afterwards the target's map is back.
    assert found["draft slots"] == [[0], [1], [2]]
    assert found["target slots"] == [[1, 3], [2], [0]]


def test_what_a_layer_dispatches_by(found: dict) -> None:
    looked_up, given, draft, unplaced = found["resolved"]
    assert looked_up == ["looked up", 1] and given is True and draft is None and unplaced is None
