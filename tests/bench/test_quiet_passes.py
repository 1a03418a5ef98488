"""What is pinned when the measures for quiet rows are taken away one at a time."""

import pytest

from bench.gpu.quiet_passes import ALL, measures, spread
from bench.harness.pinning import Cores
from sglang_eplb_affinity.domain.errors import InputError


def test_all_measures_are_those_of_a_run_and_each_other_lacks_one() -> None:
    cores = list(range(100, 132))
    found = measures(cores, 2)
    assert found[ALL] == Cores.of(cores, 2)
    own = found[ALL]
    nothing, together, single = (found[name] for name in list(found)[1:])
    assert nothing == Cores((tuple(cores),) * 2, tuple(cores), tuple(cores))
    assert together.schedulers == own.schedulers and together.rest == together.client
    assert set(together.rest) == {core for of in own.schedulers for core in of}
    assert [len(of) for of in single.schedulers] == [1, 1] and (single.rest, single.client) == (own.rest, own.client)
    assert all(len(of.schedulers) == 2 for of in found.values())
    with pytest.raises(InputError, match="4 cores are too few to give 2 schedulers their own"):
        measures(cores[:4], 2)


def test_the_spread_of_values_of_which_some_are_missing() -> None:
    assert spread([10.0, float("nan"), 10.0, 11.0]) == {"median": 10.0, "p5": 10.0, "p95": 10.9, "spread_pct": 9.0}
    assert spread([float("nan")]) == {}
