"""What compiled code is told of a dispatch rule."""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.dispatch.primaries import active_replicas
from sglang_eplb_affinity.dispatch.rules import DispatchRule, RuleNumber
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology


def tables_of_rule(
    expert_map: ExpertMap, topology: Topology, rule: DispatchRule, further_slots: int = 0
) -> tuple[np.ndarray, np.ndarray, RuleNumber]:
    """The replicas that may be taken, int32 [layers, experts, max_replicas], how many they are, int32 [layers,
    experts], and the rule among them. Raises InputError for a rule that there is not."""
    table = expert_map.logical_to_all_physical()
    if rule == "primary":
        table, rule = active_replicas(table, topology, expert_map.num_slots, further_slots), "static"
    return table, (table >= 0).sum(2).astype(np.int32), RuleNumber.of(rule)
