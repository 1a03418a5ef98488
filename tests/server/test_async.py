"""--eplb-async on a real server: what goes wrong costs a round, never an output, and nothing hangs."""

import threading
import time
import urllib.error
from pathlib import Path

import pytest

from bench.engines.emulated_hosts import EmulatedHosts
from sglang_eplb_affinity.rebalance.verify import WRONG
from tests.server.harness import RunningServer, ServerCase, Traffic, rounds, serve

HERE = Path(__file__).parent
FLAGS = ("--eplb-async", "--eplb-async-phase-limit", "10", "--eplb-min-gain", "0")


def abort_storm(server: RunningServer, seconds: float) -> None:
    """Requests whose client goes away at once."""
    deadline = time.monotonic() + seconds

    def one() -> None:
        body: dict[str, object] = {
            "text": "hello world",
            "sampling_params": {"max_new_tokens": 200, "ignore_eos": True},
        }
        while time.monotonic() < deadline:
            try:
                server.post("/generate", body, timeout=0.15)
            except (TimeoutError, urllib.error.URLError):
                continue

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_faults_cost_their_round_and_no_output(models: Path, tmp_path: Path, port: int) -> None:
    # The first outputs come from the server before its first rebalance: 3 requests of 20 passes.
    primary = ("--ep-dispatch-algorithm", "primary", "--eplb-affinity-primary-tokens", "4")
    case = ServerCase("qwen3moe", algorithm="affinity", redundant=4, iterations=70, extra=(*FLAGS, *primary))
    settings = {"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(tmp_path), "EPLB_AFFINITY_VERIFY": "1"}
    plugin = (str(HERE / "fault_plugin"),)
    log = tmp_path / "log"
    with serve(models / case.model, case.flags, log, port=port, ranks=2, python_path=plugin, **settings) as server:
        traffic = Traffic(server)
        assert not rounds(server)
        assert traffic.until_round(1)["result"] == "applied"
        assert "planner process ended (signal 9)" in traffic.until_round(2)["reason"]
        assert "no plan within 10 s" in traffic.until_round(3)["reason"]
        failed = traffic.until_round(4)
        assert failed["reason"] == "movement failed on rank 1; its log says why" and not failed["moved_layers"]
        slow = traffic.until_round(5)
        assert slow["result"] == "applied" and slow["move_seconds"] > 2
        # Aborts, HTTP endpoints and an idle server while rounds run.
        abort_storm(server, 6)
        for action in ("dump", "stop", "dump", "start"):
            server.post(f"/{action}_expert_distribution_record")
            assert traffic.outputs() == traffic.first
        time.sleep(12)  # longer than the phase limit, in whatever phase the last pass left the round
        later = traffic.until_round(rounds(server)[-1]["round"] + 2)
        assert later["result"] in ("applied", "unchanged")
        assert len(list(tmp_path.glob("expert_distribution_recorder_*.pt"))) == 2
        # Shutdown in the middle of a round.
        storm = threading.Thread(target=abort_storm, args=(server, 3))
        storm.start()
        time.sleep(2)
        server.process.terminate()
        server.process.wait(30)
        storm.join()
    text = log.read_text(errors="replace")
    assert WRONG not in text and "verify: all 4 layers hold what the map says" in text
    assert "movement failed on rank 1: layer" in text and "planted failure" in text


@pytest.mark.parametrize("case", [
    ServerCase("dsv3", ep=2, redundant=4, dp_attention=True, algorithm="deepseek", iterations=8, extra=FLAGS),
], ids=lambda case: case.name)  # fmt: skip
def test_data_parallel_attention_and_eplbs_own_algorithm(
    case: ServerCase, models: Path, tmp_path: Path, port: int, hosts: EmulatedHosts | None
) -> None:
    """Over two hosts: all that moves crosses the network between them."""
    verify = {"EPLB_AFFINITY_VERIFY": "1"}
    with serve(models / case.model, case.flags, tmp_path / "log", port=port, ranks=2, hosts=hosts, **verify) as server:
        server.generate_until(lambda: sum(record["result"] == "applied" for record in rounds(server)) >= 3, 16)
    assert {record["algorithm"] for record in rounds(server)} == {"deepseek"}
    text = server.log.read_text(errors="replace")
    assert WRONG not in text and "hold what the map says" in text
    if hosts is not None:
        of_second = (tmp_path / "log-host1").read_text(errors="replace")
        assert WRONG not in of_second and "DP1 TP1 EP1] [eplb-affinity] verify: all" in of_second
