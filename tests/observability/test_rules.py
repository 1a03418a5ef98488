"""The alert rules on made series, by Prometheus' own rule tester."""

import re
import subprocess
from pathlib import Path

from tests.observability.prometheus import ROOT, program

RULES = ROOT / "docs/prometheus/eplb_affinity_rules.yml"
CASES = Path(__file__).with_name("rules_test.yml")


def test_every_alert_fires_where_it_should_and_nowhere_else() -> None:
    alerts = set(re.findall(r"- alert: (\w+)", RULES.read_text()))
    assert alerts and alerts == set(re.findall(r'alertname="(\w+)"', CASES.read_text()))
    done = subprocess.run([program("promtool"), "test", "rules", CASES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
