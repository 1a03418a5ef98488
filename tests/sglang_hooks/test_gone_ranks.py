"""Rounds of one rank as others go and come back, without SGLang."""

from pathlib import Path

import numpy as np

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.formats.recorded_map import MapOrigin, ServedModel
from sglang_eplb_affinity.planner.living_ranks import LivingRanks
from sglang_eplb_affinity.rebalance.map_recorder import MapRecorder
from sglang_eplb_affinity.rebalance.round_record import RoundRecord
from sglang_eplb_affinity.sglang_hooks.rounds import for_living
from sglang_eplb_affinity.sglang_hooks.settings import Settings
from tests.sglang_hooks.arguments import server_arguments


def test_rounds_follow_the_ranks_that_live() -> None:
    settings = Settings.of(server_arguments(ep_size=4, nnodes=2))
    living = LivingRanks(np.array([False, True, True, True]), Topology(4, 2))
    rounds = for_living(None, settings, None)
    assert for_living(rounds, settings, None) is rounds and rounds.settings.topology == Topology(4, 2)
    rounds.number, rounds.planned = 5, True
    left = for_living(rounds, settings, living)
    assert for_living(left, settings, LivingRanks(living.alive, Topology(4, 2))) is left
    assert left.settings.topology == Topology(3) and left.first_rank == 1 and left.remark == "ranks 0 are gone"
    assert left.number == 5 and left.planned and left.history is None
    # A rank that came back has nothing that is worth keeping, so the round plans anew.
    back = for_living(left, settings, None)
    assert back.settings.topology == Topology(4, 2) and back.first_rank == 0 and back.remark is None
    assert not back.planned and back.number == 5


def test_a_map_of_the_living_is_not_recorded(tmp_path: Path) -> None:
    model = ServedModel("m", "Model", 1, 4, 2)
    origin = MapOrigin(model, Topology(2), 6, "affinity", "dynamic", 1, "now", "0.5.23", "0.1.0")
    recorder = MapRecorder(tmp_path / "map.json", origin)
    record = RoundRecord("applied", "affinity", 1)
    recorder.round_finished(record, ExpertMap.contiguous(1, 3, 3))
    assert not list(tmp_path.iterdir())
    recorder.round_finished(record, ExpertMap.contiguous(1, 4, 6))
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]
