"""The demo: what it shows, that it stops what it starts, and that it can fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clients import sends_large

# One of the demo's orders is too large for the broker.
pytestmark = [sends_large, pytest.mark.one_client]

DEMO = Path(__file__).parent.parent / "examples" / "demo"
# So that whatever a demo has started can be told from what others have.
MARK = "OTEL_KAFKA_PYTHON_DEMO_TEST"


def run(svg: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DEMO, "--svg", svg, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "kafka",
            MARK: str(svg),
            **environ,
        },
    )


def left_running(svg: Path) -> list[str]:
    mark = f"{MARK}={svg}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:  # it is gone, or not ours
            continue
    return found


def test_the_demo_shows_one_trace_through_three_services(tmp_path: Path) -> None:
    svg = tmp_path / "demo.svg"
    done = run(svg)
    assert done.returncode == 0, done.stderr
    # Up to Python 3.11 a loop cannot name the exception that ended it.
    declined = "CardDeclinedError" if sys.version_info >= (3, 12) else "_OTHER"
    failed = ("MESSAGE_TOO_LARGE", declined)
    for shown in ("checkout", "process payments", "INSERT", *failed):
        assert shown in done.stdout
        assert shown.replace(" ", "&#160;") in svg.read_text()
    assert "The bottleneck is payments" in done.stdout
    assert re.search(r"messages sent +4 +3", done.stdout)
    assert re.search(r"messages refused +1", done.stdout)
    assert re.search(r"messages consumed +4 +3", done.stdout)
    # It needs nothing from elsewhere.
    assert "@font-face" not in svg.read_text()
    assert left_running(svg) == []


def test_the_demo_fails_where_the_traces_are_not_as_expected(tmp_path: Path) -> None:
    svg = tmp_path / "demo.svg"
    done = run(svg, "--timeout", "3", OTEL_PYTHON_KAFKA_PROCESS_SPANS="false")
    assert done.returncode == 1
    assert "The telemetry is not as expected: an order's spans are" in done.stderr
    assert not svg.exists()
    assert left_running(svg) == []
