"""Prometheus' own tool on what Prometheus is given: it can be read, and alerts fire when they should and only then."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
MONITORING = ROOT / "monitoring"
RULES = sorted(map(str, (MONITORING / "rules").glob("*.yml")))
TESTS = sorted((Path(__file__).parent / "rules").glob("*_test.yml"))

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (prometheus) is not installed")


def rules(kind: str) -> list[dict]:
    found = [yaml.safe_load(Path(path).read_text()) for path in RULES]
    return [rule for one in found for group in one["groups"] for rule in group["rules"] if kind in rule]


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_promtool
def test_the_configuration_and_its_rules_can_be_read():
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")
    assert "duplicate" not in promtool("check", "rules", *RULES)


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then():
    assert "SUCCESS" in promtool("test", "rules", *map(str, TESTS))


def test_every_alert_says_what_to_do_and_is_tested_and_documented():
    readme = (ROOT / "README.md").read_text()
    tests = "".join(path.read_text() for path in TESTS)
    alerts = rules("alert")
    assert len(alerts) >= 10
    for alert in alerts:
        name = alert["alert"]
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"]
        assert alert["annotations"]["runbook"].startswith(f"README, Watch it, {name}: ")
        assert f"`{name}`" in readme, f"{name} is not in the README"
        # Silent where all is well, and firing.
        assert len(re.findall(rf"\b{name}\b", tests)) >= 2, f"{name} is not tested"


def test_nothing_is_recorded_that_nobody_asks_for():
    asked = " ".join(rule["expr"] for rule in rules("alert"))
    asked += " ".join(path.read_text() for path in (MONITORING / "grafana").rglob("*.json"))
    for rule in rules("record"):
        assert rule["record"] in asked, rule["record"]
