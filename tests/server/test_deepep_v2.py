"""DeepEP V2: what SGLang's dispatcher sends is what our step chose, and only real tokens are counted, by phase."""

import importlib.metadata

import pytest

from tests.server.check_deepep_v2 import DECODE, PASSES, PREFILL, SLOTS
from tests.server.harness import found_by

pytestmark = pytest.mark.skipif(importlib.metadata.version("sglang") == "0.5.17", reason="SGLang 0.5.17 has no V2")


@pytest.fixture(scope="module")
def found() -> dict:
    return found_by("check_deepep_v2")


@pytest.mark.parametrize(("name", "rows"), [("prefill", PREFILL), ("decode", DECODE)])
def test_the_buffer_gets_physical_ids_and_padding_selects_nothing(found: dict, name: str, rows: list) -> None:
    sent, real = found[name]["sent"], PASSES[name][2]
    assert found[name]["mapped"]
    assert [[int(SLOTS[slot]) for slot in row] for row in sent[:real]] == rows[:real]
    assert sent[real:] == [[-1, -1]] * (len(rows) - real)
    assert found[name]["rows back"] == len(rows)
    # One copy for each rank: experts 0 and 1 are beside any other, so no real token needs two.
    assert all(len({slot // 3 for slot in row}) == 1 for row in sent[:real] if set(row) != {2, 3})


def test_real_tokens_are_counted_in_their_phase(found: dict) -> None:
    def counts(rows: list) -> list[int]:
        return [sum(row.count(expert) for row in rows) for expert in range(4)]

    assert found["prefill"]["counts"] == [counts(PREFILL[:4]), [0] * 4]
    assert found["decode"]["counts"] == [counts(PREFILL[:4]), counts(DECODE[:2])]


def test_prefill_waits_for_counts_and_decode_does_not(found: dict) -> None:
    assert [found[name]["waits"] for name in PASSES] == [True, False, True]


def test_the_token_that_an_idle_rank_sends_is_not_counted(found: dict) -> None:
    assert found["idle prefill"]["sent"] == [[0, 1]] and found["idle prefill"]["weights"] == [[0.0, 0.0]]
    assert found["idle prefill"]["rows back"] == 0
    assert found["idle prefill"]["counts"] == found["decode"]["counts"]


def test_sglangs_own_counts_come_from_the_top_k(found: dict) -> None:
    assert found["gatherer"] == "_SelectExpertsSinglePassGatherer"
