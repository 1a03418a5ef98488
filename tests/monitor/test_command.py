"""The command against stand-ins of servers: errors, exit codes, side by side, and the GPUs that NVML sees."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from rich.console import Console

from sglang_eplb_affinity.cli.monitor import monitor_command
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.monitor import fetch
from sglang_eplb_affinity.monitor.gpus import Gpu, read_gpus
from sglang_eplb_affinity.monitor.history import ServerHistory
from sglang_eplb_affinity.monitor.view import screen
from tests.monitor.conftest import Exporter
from tests.monitor.stand_in import answers


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "has no /metrics; start the server with --enable-metrics"),
        (
            {"/metrics": "sglang:num_running_reqs 1.0\n"},
            "none of placement; start the server with --eplb-algorithm aff",
        ),
        ({"/metrics": "<html>hello there</html>"}, "/metrics: is not Prometheus' text format"),
    ],
)
def test_servers_that_say_nothing(texts: dict[str, str], message: str) -> None:
    with answers(texts) as address:
        done = CliRunner().invoke(monitor_command, [address, "--once"])
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: http://{address}") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_server_and_one_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with answers({}) as address:
        pass
    with pytest.raises(InputError, match=f"^http://{address}: not reachable .connection refused"):
        fetch.read(f"http://{address}", 5)
    with answers({"/metrics": ""}, delay=1) as address, pytest.raises(InputError, match="did not answer within 0"):
        fetch.read(f"http://{address}", 0.2)


NO_URLS = [
    "foo:bar",
    "ftp://a:1",
    "http://",
    "http://a:99999",
    "a..b:30000",
    "a" * 70,
    "a b:1",
    "http://a:1?b",
    "a:1#b",
]


@pytest.mark.parametrize("url", NO_URLS)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(url)}: is not the URL of a server"):
        fetch.base_url(url)


def test_a_server_is_read_once_whatever_it_is_called(exporter: Exporter) -> None:
    exporter.end_round("applied")
    with answers({"/metrics": exporter.text()}) as address:
        names = [address, f"http://{address}", f"http://{address}/metrics"]
        done = CliRunner().invoke(monitor_command, [*names, "--once", "--format", "json"])
    assert done.exit_code == 0 and len(json.loads(done.stdout)["servers"]) == 1


def test_figures_without_a_value_yet_and_states_that_are_not_ours() -> None:
    text = 'eplb_affinity_rebalances_total{result="applied"} 1\neplb_affinity_balancedness{map="after"} NaN\n'
    for state in (5, "x", [1], None):
        info = json.dumps({"internal_states": [{"eplb_affinity": state}]})
        with answers({"/metrics": text, "/server_info": info}) as address:
            arguments = [address, "--once", "--format", "json", "--alert", "balancedness=0.8"]
            done = CliRunner().invoke(monitor_command, arguments)
        assert done.exit_code == 0 and "balancedness has no value yet" in done.stderr
        assert "NaN" not in done.stdout and json.loads(done.stdout)["servers"][0]["placements"][0]["balancedness"] == {}


def test_json_of_two_servers_one_of_which_is_away(exporter: Exporter) -> None:
    record = exporter.end_round("applied")
    info = json.dumps({"internal_states": [{"eplb_affinity": record.to_json()}]})
    with answers({"/metrics": exporter.text(), "/server_info": info}) as address:
        both = CliRunner().invoke(monitor_command, [address, "127.0.0.1:9", "--once", "--format", "json"])
        alert = CliRunner().invoke(
            monitor_command, [f"http://{address}/metrics", "--once", "--format", "json", "--alert", "balancedness=0.95"]
        )
        fine = CliRunner().invoke(monitor_command, [address, "--once", "--alert", "balancedness=0.85"])
    assert both.exit_code == 2 and "127.0.0.1:9" in both.stderr
    found, away = json.loads(both.stdout)["servers"]
    assert found["placements"][0]["balancedness"]["after"] == 0.9 and "not reachable" in away["error"]
    assert found["placements"][0]["record"]["round"] == 1
    assert alert.exit_code == 1 and json.loads(alert.stdout)["alerts"][0]["limit"] == 0.95
    assert fine.exit_code == 0 and "applied" in fine.stdout and "0.900" in fine.stdout


def test_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.modules['rich'] = None\nimport importlib.util as u; find = u.find_spec\n"
    code += "u.find_spec = lambda name: None if name == 'rich' else find(name)\n"
    code += "from sglang_eplb_affinity.cli import main; sys.argv[1:] = ['monitor', 'a:1']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: monitor: needs rich, which is not installed: `pip install '.[monitor]'` in the checkout\n"
    )


def drawn(servers: list[ServerHistory], width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(screen(servers, [Gpu(0, "H100", 87), Gpu(1, "H100", None)], [], width))
    return console.export_text()


def test_side_by_side_where_they_fit(exporter: Exporter) -> None:
    exporter.end_round("applied")
    servers = [ServerHistory("http://a:1"), ServerHistory("http://b:1"), ServerHistory("http://c:1")]
    for server in servers[:2]:
        server.add(exporter.reading())
    servers[2].add(InputError("http://c:1: not reachable"))
    wide, narrow = drawn(servers, 210), drawn(servers, 100)
    assert any("http://a:1" in line and "http://b:1" in line for line in wide.splitlines())
    assert any(line.split()[:2] == ["a:1", "0.90"] for line in narrow.splitlines())
    for text in (wide, narrow):
        assert "http://c:1: not reachable" in text and "0: 87 %, 1: - %" in text


class NvmlError(Exception):
    pass


def test_gpus_that_nvml_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    def utilization(index: int) -> SimpleNamespace:
        if index:
            raise NvmlError  # as with MIG
        return SimpleNamespace(gpu=87)

    nvml = SimpleNamespace(
        NVMLError=NvmlError, nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetName=lambda index: "NVIDIA H100",
        nvmlDeviceGetUtilizationRates=utilization,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert read_gpus() == [Gpu(0, "NVIDIA H100", 87), Gpu(1, "NVIDIA H100", None)]

    def no_driver() -> None:
        raise NvmlError

    nvml.nvmlInit = no_driver
    assert read_gpus() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_gpus() == []
