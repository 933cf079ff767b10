"""The alert rules of the examples, and their own tests, which Prometheus' tool runs."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from backends import found, why_unavailable

pytestmark = pytest.mark.one_client

EXAMPLES = Path(__file__).parent.parent / "examples"
(GROUP,) = yaml.safe_load((EXAMPLES / "prometheus-rules.yaml").read_text())["groups"]
TESTS = yaml.safe_load((EXAMPLES / "prometheus-rules-test.yaml").read_text())["tests"]


@pytest.mark.skipif(
    bool(why_unavailable("promtool")), reason=why_unavailable("promtool")
)
def test_promtool_accepts_the_rules_and_their_tests() -> None:
    promtool = found("promtool")
    assert promtool is not None
    for arguments in (
        ("check", "rules", "prometheus-rules.yaml"),
        ("test", "rules", "prometheus-rules-test.yaml"),
    ):
        done = subprocess.run(
            [promtool, *arguments],
            check=False,
            cwd=EXAMPLES,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def states(alert: str) -> Iterator[list[bool]]:
    """Whether an alert fires, one time after another, in each test that expects it."""
    for test in TESTS:
        steps = [each for each in test["alert_rule_test"] if each["alertname"] == alert]
        steps.sort(key=lambda step: int(step["eval_time"].removesuffix("m")))
        fires = [bool(step.get("exp_alerts")) for step in steps]
        if any(fires):
            yield fires


@pytest.mark.parametrize("alert", [rule["alert"] for rule in GROUP["rules"]])
def test_each_alert_is_tested_to_fire_and_to_stop(alert: str) -> None:
    tested = list(states(alert))
    assert any(not fires[0] for fires in tested)
    assert any(not fires[-1] for fires in tested)
