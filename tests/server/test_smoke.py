"""The least that holds on every version of SGLang: it starts, rebalances both ways, and greedy outputs stay.

`make test SGLANG=...` runs this on the version that is not the default.
"""

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
