"""One server with rounds behind it, watched by the monitor in a real terminal and scraped by a real Prometheus."""

import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pexpect
import pyte
import pytest

from tests.monitor.stand_in import DCGM, answers
from tests.observability.prometheus import ROOT, Prometheus, prometheus
from tests.server.conftest import free_port
from tests.server.harness import RunningServer, ServerCase, prompts, rounds, serve

CASE = ServerCase("qwen3moe", algorithm="affinity", redundant=4, iterations=40,
                  extra=("--eplb-async", "--eplb-min-gain", "0", "--enable-metrics"))  # fmt: skip
RULES = ROOT / "docs/prometheus/eplb_affinity_rules.yml"
DASHBOARD = json.loads((ROOT / "docs/grafana/eplb_affinity.json").read_text())
MONITOR = ["-m", "sglang_eplb_affinity", "monitor"]


class SteadyTraffic:
    """Requests one after another from a thread of its own, so that rates have something to count."""

    def __init__(self, server: RunningServer) -> None:
        self._server, self._stop = server, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._server.generate(prompts(2), tokens=16)
            self._stop.wait(0.2)


@pytest.fixture(scope="module")
def observed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Prometheus]]:
    """After two windows that were recorded under planned maps, so that a delivery can stand beside a promise.

    The Prometheus has scraped the server from before its first round. GPU utilisation comes from a stand-in of NVIDIA's
    DCGM exporter; all else from the server.
    """
    folder = tmp_path_factory.mktemp("observed")
    with (
        serve(models / CASE.model, CASE.flags, folder / "log", port=free_port(), ranks=CASE.ep) as server,
        answers({"/metrics": DCGM}) as dcgm,
        prometheus([server.url.removeprefix("http://"), dcgm], RULES, folder / "prometheus") as scraped,
    ):
        server.generate_until(lambda: len(rounds(server)) >= 3, 6, seconds=480)
        yield server, scraped


@pytest.fixture
def served(observed: tuple[RunningServer, Prometheus]) -> RunningServer:
    return observed[0]


@dataclass(frozen=True)
class Query:
    where: str
    text: str

    def __str__(self) -> str:
        return self.where


def dashboard_queries() -> list[Query]:
    """As Grafana sends them."""
    targets = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
    targets += [(mark["name"], with_data(mark["expr"])) for mark in DASHBOARD["annotations"]["list"]]
    variables = {"$model": ".*", "$__rate_interval": "10m", "$__range": "10m", "$__interval": "10m"}
    return [Query(title, _replaced(text, variables)) for title, text in targets]


def _replaced(text: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        text = text.replace(name, value)
    assert "$" not in text
    return text


def with_data(expression: str) -> str:
    """The same with 0 or 1 for each comparison, which alone leaves out what does not hold."""
    return re.sub(r" (<=|>=|==|!=|<|>) ", r" \1 bool ", expression)


def wait_for_data(server: Prometheus, queries: list[Query]) -> None:
    """Until each has returned a number; rates need some scrapes and something that happens between them."""
    waiting, deadline = queries, time.monotonic() + 90
    while waiting:
        waiting = [q for q in waiting if not any(not math.isnan(value) for _, value in server.query(q.text))]
        assert time.monotonic() < deadline, [(q.where, q.text) for q in waiting]
        time.sleep(1)


def test_every_query_of_dashboard_and_rules_returns_data(observed: tuple[RunningServer, Prometheus]) -> None:
    server, scraped = observed
    variable = next(v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query")
    ((metric, label),) = re.findall(r"label_values\((\w+), (\w+)\)", variable)
    (model,) = scraped.get(f"label/{label}/values", **{"match[]": metric})
    assert Path(model).name == CASE.model
    rules = [rule for group in scraped.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == RULES.read_text().count("expr:")
    queries = [*dashboard_queries(), *(Query(rule["name"], with_data(rule["query"])) for rule in rules)]
    if not any(
        "promised_load" in line for line in rounds(server)
    ):  # rounds that judge no map have nothing to say there
        judged = re.compile("regret|promised_|delivered_|previous_map_|best_map_")
        queries = [query for query in queries if not judged.search(query.text)]
    with SteadyTraffic(server):
        wait_for_data(scraped, queries)
    assert {m["map"] for m, _ in scraped.query("expert_load_balance_ratio")} == {"contiguous", "before", "after"}
    rules = [rule for group in scraped.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}


def test_once_says_what_the_log_says(served: RunningServer) -> None:
    command = [sys.executable, *MONITOR, served.url, "--once", "--format", "json", "--alert", "balancedness=1.01"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    (server,), (alert,) = found["servers"], found["alerts"]
    (placement,) = server["placements"]
    line = next(line for line in rounds(served) if line["round"] == placement["record"]["round"])
    assert placement["record"] == line
    assert sum(placement["rounds"].values()) == line["round"] and placement["moved_bytes"] > 0
    for of in ("promised", "delivered") if "promised_load" in line else ():
        assert round(placement[of]["load"], 4) == line[f"{of}_load"]
    assert round(alert["value"], 4) == round(placement["balancedness"]["after"], 4) == line["balancedness_after"]
    assert 0 < server["tpot_mean_seconds"] < server["ttft_p99_seconds"] < 400


class Terminal:
    """What a program shows on a screen of this size."""

    def __init__(self, arguments: list[str], columns: int, lines: int) -> None:
        # A suite that runs in the background of a shell ignores Ctrl-C, and so would what it starts.
        self.process = pexpect.spawn(
            sys.executable,
            arguments,
            cwd=str(ROOT),
            dimensions=(lines, columns),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, text := "\n".join(self._screen.display)):
            assert time.monotonic() < deadline and self.process.isalive(), f"{pattern} not on the screen:\n{text}"
            try:
                self._stream.feed(self.process.read_nonblocking(65536, timeout=1))
            except pexpect.TIMEOUT:
                continue
        return text

    def interrupt(self) -> int:
        """Ctrl-C; the exit code."""
        self.process.sendintr()
        self.process.expect(pexpect.EOF, timeout=60)
        self.process.wait()
        return int(self.process.exitstatus)


def test_live_in_a_terminal(served: RunningServer) -> None:
    number = rounds(served)[-1]["round"]
    other = served.url.replace("127.0.0.1", "localhost")
    terminal = Terminal([*MONITOR, served.url, other, "--interval", "0.5"], 150, 40)
    try:
        # Two servers with all that they have to show do not fit side by side: a row for each.
        text = terminal.wait_for(r"balanced +GPUs(.|\n)*localhost.* [01]\.\d\d ")
        assert "127.0.0.1" in text and "Ctrl-C ends" in text
        served.generate_until(lambda: len(rounds(served)) > number, 6)
        # A round that was on its way may have ended since: any later one than before.
        later = "|".join(str(count) for count in range(number + 1, number + 10))
        terminal.wait_for(rf" ({later}) +\d+\.\d MB")
        assert terminal.interrupt() == 0
    finally:
        terminal.process.close(force=True)


def test_live_with_an_alert_ends_with_1(served: RunningServer) -> None:
    terminal = Terminal([*MONITOR, served.url, "--alert", "balancedness=1.01"], 90, 40)
    try:
        terminal.wait_for(r"ALERT .*balancedness \S+ is below 1.01")
        assert terminal.interrupt() == 1
    finally:
        terminal.process.close(force=True)
