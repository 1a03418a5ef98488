from dataclasses import asdict

from bench.figures.metrics import placement_metrics
from bench.figures.rebalance_log import LogSummary, Rebalance, parse_log


def test_reads_every_rebalance_of_a_patched_server(affinity_log: str) -> None:
    summary = parse_log(affinity_log)
    first, second = summary.rebalances
    assert (first.result, first.moved_experts, first.moved, first.time) == ("applied", 21, True, "2026-11-21 20:05:59")
    assert (first.balancedness_before, first.gpu_fanout_after, first.node_fanout_before) == (0.701, 1.61, None)
    assert second.result == "unchanged" and not second.moved
    assert (summary.moved, summary.upstream_ends, summary.malformed) == (1, 2, 0)


def test_times_to_the_millisecond_are_read(affinity_log: str) -> None:
    fine = affinity_log.replace(" TP", ".250 TP")
    assert parse_log(fine).rebalances[0].time == "2026-11-21 20:05:59.250"
    assert parse_log(fine).upstream_ends == parse_log(affinity_log).upstream_ends


def test_unpatched_server_counts_rebalances_once_not_per_rank(unpatched_log: str) -> None:
    summary = parse_log(unpatched_log)
    assert summary.rebalances == () and summary.upstream_ends == 1


def test_applied_without_moves_does_not_count_as_moved() -> None:
    line = '[eplb-affinity] rebalance {"result": "applied", "moved_experts": 0}'
    assert parse_log(line).moved == 0


def test_unreadable_lines_are_counted_and_unknown_keys_passed_over() -> None:
    good = '[eplb-affinity] rebalance {"result": "applied", "moved_experts": 3, "key_of_a_later_version": 1}'
    no_result = '[eplb-affinity] rebalance {"moved_experts": 3}'
    not_json = "[eplb-affinity] rebalance {moved}"
    summary = parse_log("\n".join([good, no_result, not_json]))
    assert len(summary.rebalances) == 1 and summary.malformed == 2


def test_placement_in_use_is_judged_on_traffic_it_was_not_planned_on(affinity_log: str) -> None:
    life = parse_log(affinity_log)
    placement = placement_metrics(life, life)
    assert placement["balancedness_initial"] == 0.701
    assert placement["balancedness_served"] == 0.941  # not 0.962, which the plan promised
    assert placement["gpu_fanout_served"] == 1.64
    assert placement["node_fanout_initial"] is None
    assert (placement["rebalances"], placement["rebalances_moved"], placement["moved_experts"]) == (2, 1, 21)


def test_rebalances_before_the_cell_set_the_initial_placement_only(affinity_log: str) -> None:
    life = parse_log(affinity_log)
    cell = LogSummary(life.rebalances[1:], 1)
    placement = placement_metrics(life, cell)
    assert placement["gpu_fanout_initial"] == 1.88 and placement["gpu_fanout_served"] == 1.64
    assert placement["rebalances"] == 1 and placement["rebalances_moved"] == 0


def test_nothing_is_served_by_a_new_placement_before_experts_moved(affinity_log: str) -> None:
    first = LogSummary(parse_log(affinity_log).rebalances[:1], 1)
    assert placement_metrics(first, first)["gpu_fanout_served"] is None


def test_without_our_line_nobody_knows_what_moved(unpatched_log: str) -> None:
    seen = parse_log(unpatched_log)
    placement = placement_metrics(seen, seen)
    assert placement["rebalances"] == 1 and placement["rebalances_moved"] is None
    assert placement_metrics(LogSummary((), 0), LogSummary((), 0))["rebalances_moved"] == 0


def test_times_of_commits_are_those_of_rounds_that_moved_experts() -> None:
    line = '[eplb-affinity] rebalance {"result": "applied", "moved_experts": %d, "commit_ms": %s}'
    life = parse_log("\n".join([line % (3, "[0.25, 0.75]"), line % (0, "[9]"), line % (2, "[0.5]")]))
    assert (
        life.rebalances[0].commit_ms == (0.25, 0.75) and Rebalance.of(asdict(life.rebalances[0])) == life.rebalances[0]
    )
    assert 0.7 < (placement_metrics(life, life)["commit_ms_p99"] or 0) < 0.75
    assert placement_metrics(life, LogSummary((), 0))["commit_ms_p99"] is None
