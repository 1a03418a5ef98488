"""What rounds beside serving cost a decode step, from a log as a server writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.figures.round_steps import main, round_steps
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.rebalance.round_record import Result, RoundRecord

START = 1_795_000_000.0
LONGER = {"gather": 0.0, "plan": 0.5, "move": 2.0, "end": 0.0}  # ms, of steps of 6 ms
LASTS = {"gather": 0.02, "plan": 0.1, "move": 0.25, "end": 0.01}


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(START + seconds).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def decode_line(seconds: float, running: int, rate: float) -> str:
    return (
        f"[{stamp(seconds)} DP0 TP0 EP0] Decode batch, #running-req: {running}, #token: 66048, token usage: 0.66, "
        f"cuda graph: True, gen throughput (token/s): {rate:.2f}, #queue-req: 0"
    )


def round_line(ended: float, result: Result, phases: Mapping[str, float], seconds: float) -> str:
    record = RoundRecord(result, "affinity", 1, "asynchronous", moved_experts=9, phase_seconds=phases, seconds=seconds)
    return f"[{stamp(ended)} DP0 TP0 EP0] [eplb-affinity] rebalance {json.dumps(record.to_json())}"


def server_log(rounds: int, every: float = 0.8) -> str:
    """A round begins each ``every`` seconds; lines of 4 steps of 64 requests."""
    lines, now = [], 0.0
    phase_ends = [(number * every, number * every + sum(LASTS.values())) for number in range(rounds)]
    while now < rounds * every:
        begin = now
        for _ in range(4):
            place, longer = now % every, 0.0
            for phase, seconds in LASTS.items():
                if 0 <= place < seconds:
                    longer = LONGER[phase]
                place -= seconds
            now += (6 + longer) / 1e3
        lines.append((now, decode_line(now, 64, 4 * 64 / (now - begin))))
        lines += [(now, f"[{stamp(now)} DP1 TP1 EP1] Prefill batch, #new-seq: 1, #running-req: 3, #queue-req: 0")]
    for began, ended in phase_ends:
        lines.append((ended, round_line(ended, "applied", LASTS, ended - began)))
    lines.append((now, decode_line(now, 12, 900.0)))  # the last requests of a wave
    lines.append((now + 9, decode_line(now + 9, 12, 7.0)))
    return "\n".join(line for _, line in sorted(lines))


def test_each_phase_has_what_it_costs() -> None:
    found = round_steps(server_log(40))
    assert found.rounds == 40 and found.base_ms == pytest.approx(6.0, abs=0.02)
    costs = {cost.phase: cost for cost in found.phases}
    assert list(costs) == ["gather", "plan", "move", "end"]
    for phase in ("plan", "move"):
        assert costs[phase].extra_ms == pytest.approx(LONGER[phase], abs=0.1)
        assert costs[phase].share == pytest.approx(LASTS[phase] / 0.8, rel=0.05)
    assert costs["move"].loss_pct == pytest.approx(100 * 2 / 6 * 0.25 / 0.8, rel=0.1)
    assert abs(costs["gather"].extra_ms) < 4 * costs["gather"].error_ms + 0.05


def test_lines_that_a_pause_is_in_and_rounds_that_move_nothing_are_left_out() -> None:
    plain = server_log(20)
    unchanged = round_line(2.0, "unchanged", {"gather": 0.02, "plan": 0.08}, 0.1)
    cut_short = round_line(3.0, "applied", LASTS, 0.4)[:90] + "}"
    paused = f"{decode_line(30.0, 64, 9.0)}\n{decode_line(33.0, 64, 85.0)}"
    found = round_steps("\n".join((plain, paused, unchanged, cut_short)))
    assert (found.rounds, found.base_ms) == (20, round_steps(plain).base_ms)


def test_what_the_command_prints_and_refuses(tmp_path: Path) -> None:
    (tmp_path / "async.log").write_text(server_log(20))
    (tmp_path / "none.log").write_text(decode_line(1.0, 64, 9000.0))
    done = CliRunner().invoke(main, [str(tmp_path / "async.log")])
    assert done.exit_code == 0 and "| move | 31." in done.output and "20 rounds" in done.output
    refused = CliRunner().invoke(main, [str(tmp_path / "none.log")])
    assert refused.exit_code == 2 and "0 asynchronous rounds and 0 decode lines of 0 requests" in refused.output
    with pytest.raises(InputError, match="too few"):
        round_steps("")
