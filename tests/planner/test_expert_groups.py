"""Models that route by groups of experts: plans beside EPLB's placement of whole groups on nodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sglang_eplb_affinity.dispatch.evaluate import measure
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.planner import PlannerConfig, eplb_placement, plan
from tests.planner.windows import window_of


def test_expert_groups_start_the_search_where_they_score_better():
    # As in DeepSeek-V3, a token picks 8 experts from 4 of 8 groups: packing groups to nodes keeps it on few of 4 nodes.
    rng = np.random.default_rng(12)
    chosen = np.argsort(rng.random((3000, 8)), axis=1)[:, :4]
    within = np.argsort(rng.random((3000, 4, 16)), axis=2)[..., :2]
    tokens = (chosen[..., None] * 16 + within).reshape(1, 3000, 8).astype(np.int16)
    window, topology = window_of(tokens, 128), Topology(32, 4)
    plain, grouped = (plan(window, topology, 128, PlannerConfig(num_groups=groups)).report for groups in (None, 8))
    hierarchical = eplb_placement(window.counts, topology, 128, hierarchical=True, num_groups=8)
    traffic = measure(tokens, hierarchical, topology, "cover", None)
    assert grouped.fallback == ("",)
    assert grouped.eplb.cost[0] == pytest.approx(traffic.gpu_fanout[0] + 2 * traffic.node_fanout[0])
    assert grouped.planned.cost[0] < grouped.eplb.cost[0] < plain.eplb.cost[0]
    assert grouped.planned.cost[0] != plain.planned.cost[0]
    # Groups that do not divide over the nodes are not used, as in SGLang; those that do not divide the experts are an
    # error.
    ignored = plan(window, topology, 128, PlannerConfig(num_groups=2)).report
    assert ignored.planned.cost[0] == plain.planned.cost[0]
    with pytest.raises(InputError, match="num_groups=12"):
        plan(window, topology, 128, PlannerConfig(num_groups=12))


@pytest.mark.parametrize("moves", [None, 2])
def test_groups_of_unequal_load_stay_on_their_nodes_within_the_load_of_eplbs_hierarchical_map(
    moves: int | None,
) -> None:
    # A group a node, and some groups are picked twice as often: evener loads would scatter them over the nodes.
    rng = np.random.default_rng(13)
    liking = rng.gumbel(size=(3000, 8)) + np.linspace(0.0, 1.0, 8)
    chosen = np.argsort(-liking, axis=1)[:, :4]
    within = np.argsort(rng.random((3000, 4, 16)), axis=2)[..., :2]
    tokens = (chosen[..., None] * 16 + within).reshape(1, 3000, 8).astype(np.int16)
    window, topology = window_of(tokens, 128), Topology(32, 8)
    hierarchical = eplb_placement(window.counts, topology, 160, hierarchical=True, num_groups=8)
    config = PlannerConfig(num_groups=8, max_moves=moves)
    report = plan(window, topology, 160, config, None if moves is None else hierarchical).report
    scattered = plan(window, topology, 160, replace(config, num_groups=None, max_moves=None)).report
    assert report.eplb.load_max_over_mean[0] > scattered.eplb.load_max_over_mean[0] + 0.1
    assert report.planned.cost[0] < min(report.eplb.cost[0], scattered.planned.cost[0])
    assert report.planned.node_fanout[0] < report.eplb.node_fanout[0] + 0.01 < scattered.planned.node_fanout[0]
    assert report.planned.load_max_over_mean[0] < report.eplb.load_max_over_mean[0] + 0.05
