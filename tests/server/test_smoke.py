"""The least that holds on every version of SGLang: it starts, rebalances both ways, and greedy outputs stay.

`make test SGLANG=...` runs this on the version that is not the default.
"""

import json
from pathlib import Path

import pytest

from tests.server.harness import ServerCase, Traffic, rounds, serve


@pytest.mark.parametrize("extra", [(), ("--eplb-async",)], ids=["synchronous", "asynchronous"])
def test_outputs_stay_over_two_rebalances(extra: tuple[str, ...], models: Path, tmp_path: Path, port: int) -> None:
    # The first outputs come before the first rebalance: 3 requests of 20 passes, and those of the start.
    flags = (*extra, "--eplb-min-gain", "0")
    case = ServerCase("qwen3moe", redundant=4, algorithm="affinity", iterations=100, extra=flags)
    with serve(models / case.model, case.flags, tmp_path / "log", port=port, ranks=case.ep) as server:
        traffic = Traffic(server)
        assert not rounds(server)
        seen, moved = 0, 0
        while moved < 2:
            seen += 1
            record = traffic.until_round(seen)
            moved += record["result"] == "applied" and record["moved_experts"] > 0
            assert seen < 8
        assert record["mode"] == ("asynchronous" if extra else "synchronous")
        # The map in force was put there by a round before: what became of its promise, and the map before it.
        later = traffic.until_round(record["round"] + 1)
        for of in ("promised", "delivered", "previous_map", "best_map"):
            assert later[f"{of}_load"] >= 1 and later[f"{of}_gpu_fanout"] >= 1 and later[f"{of}_cost"] > 0
        assert later["delivered_gpu_fanout"] == pytest.approx(later["gpu_fanout_before"], abs=1e-3)
        assert later["promised_gpu_fanout"] == pytest.approx(record["gpu_fanout_after"], abs=1e-3)
        states = json.loads(server.get("/server_info"))["internal_states"]
        assert states[0]["eplb_affinity"] == rounds(server)[-1]
