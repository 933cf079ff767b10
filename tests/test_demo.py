"""The demo: what it shows, that it stops what it starts, and that it can fail."""

from __future__ import annotations

import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from opentelemetry.test._otlp_test_server import OtlpProtoTestServer
from rich.console import Console

from apache_broker import free_ports
from clients import DEADLINE, sends_large

# One of the demo's orders is too large for the broker.
pytestmark = [sends_large, pytest.mark.one_client]

DEMO = Path(__file__).parent.parent / "examples" / "demo"
# So that whatever a demo has started can be told from what others have.
MARK = "OTEL_KAFKA_PYTHON_DEMO_TEST"


def start(svg: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, DEMO, "--svg", svg, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "kafka",
            MARK: str(svg),
            **environ,
        },
    )


class Done(NamedTuple):
    """What a demo did, and what a backend got of it."""

    returncode: int
    stdout: str
    stderr: str
    svg: Path
    spans: list[Any]
    metrics: list[Any]


def run(svg: Path, *arguments: str, **environ: str) -> Done:
    with OtlpProtoTestServer() as backend:
        url = f"http://127.0.0.1:{backend.port}"
        with start(svg, "--otlp", url, *arguments, **environ) as process:
            stdout, stderr = process.communicate(timeout=300)
        spans, metrics = backend.drain_spans(), backend.drain_metrics()
    return Done(process.returncode, stdout, stderr, svg, spans, metrics)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    done = run(tmp_path_factory.mktemp("demo") / "demo.svg", "--orders", "20")
    assert done.returncode == 0, done.stderr
    return done


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


def wait_until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_demo_shows_one_trace_through_three_services(done: Done) -> None:
    # Up to Python 3.11 a loop cannot name the exception that ended it.
    declined = "CardDeclinedError" if sys.version_info >= (3, 12) else "_OTHER"
    failed = ("MESSAGE_TOO_LARGE", declined)
    for shown in ("checkout", "process payments", "INSERT", *failed):
        assert shown in done.stdout
        assert shown.replace(" ", "&#160;") in done.svg.read_text()
    assert re.search(
        rf"1003 +└ process orders +(payments +)?·+━+ .* {declined}", done.stdout
    )
    assert re.search(
        r"The bottleneck is payments: it takes .* per order \(median", done.stdout
    )
    # It needs nothing from elsewhere.
    assert "@font-face" not in done.svg.read_text()
    assert left_running(done.svg) == []


def test_the_metrics_are_of_all_orders(done: Done) -> None:
    assert re.search(r"messages sent +24 +23", done.stdout)
    assert re.search(r"messages refused +1", done.stdout)
    assert re.search(r"messages consumed +24 +23", done.stdout)
    waiting = r"([\d.]+ s|[\d.]+ ms|< 5 ms)"
    assert re.search(rf"orders → payments +{waiting} +{waiting}", done.stdout)
    latency = rf"From send to shipping, an order takes {waiting} \(median"
    assert re.search(latency, done.stdout)
    assert "payments is the bottleneck: half of the orders waited" in done.stdout


def test_a_backend_gets_the_telemetry_too(done: Done) -> None:
    assert "The traces were also sent to " in done.stdout
    assert "The metrics were also sent to " in done.stdout
    names = Counter(each.span.name for each in done.spans)
    assert names["checkout"] == 1
    assert names["process payments"] >= 3
    metrics = {each.metric.name for each in done.metrics}
    assert "messaging.process.duration" in metrics


def test_the_demo_fails_where_the_traces_are_not_as_expected(tmp_path: Path) -> None:
    svg = tmp_path / "demo.svg"
    options = ("--timeout", "3", "--orders", "0")
    done = run(svg, *options, OTEL_PYTHON_KAFKA_PROCESS_SPANS="false")
    assert done.returncode == 1
    assert "The telemetry is not as expected: an order's spans are" in done.stderr
    assert not svg.exists()
    assert left_running(svg) == []


def test_ctrl_c_ends_the_demo_and_all_that_it_started(tmp_path: Path) -> None:
    svg = tmp_path / "demo.svg"
    with start(svg) as demo:
        try:
            wait_until(lambda: any("shipping.py" in each for each in left_running(svg)))
        finally:
            os.killpg(demo.pid, signal.SIGINT)  # as a terminal does
        stdout, stderr = demo.communicate(timeout=DEADLINE)
    assert (demo.returncode, stdout, stderr) == (130, "", "The demo was stopped.\n")
    # The kernel kills a service that had just started.
    wait_until(lambda: left_running(svg) == [])


# Parts of it, on their own.


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The demo's modules, by name."""
    monkeypatch.syspath_prepend(str(DEMO))
    names = ("story", "measures", "waterfall", "relay")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name)


def made_up_trace(story: Any) -> Any:
    """An order that waits a second and then fails."""

    def span(name: str, service: str, start: int, end: int, **attributes: Any) -> Any:
        times = (start * 10**6, end * 10**6)
        ids = (name.encode(), b"", b"trace")
        return story.Span(name, service, *ids, *times, False, attributes, [], [])

    root = span("checkout", "orders", 0, 100)
    send = span("send orders", "orders", 0, 100)
    send.attributes["messaging.kafka.message.key"] = "1001"
    process = span("process orders", "payments", 1100, 1200)
    process.failed = True
    process.attributes["error.type"] = "CardDeclinedError"
    root.children, send.children = [send], [process]
    return root


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (120, ["order", "span", "service", "took", "error"]),
        (90, ["order", "span", "took", "error"]),
        (80, ["order", "span", "error"]),
        (60, ["order", "span"]),
    ],
)
def test_a_narrow_terminal_loses_columns_before_bars(
    module: Any, width: int, titles: list[str]
) -> None:
    console = Console(width=width, file=io.StringIO())
    console.print(module.waterfall.draw(made_up_trace(module.story), [], width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert {len(line) for line in lines} == {width}
    assert re.sub("[┬─│]", "", lines[2]).split() == titles
    (process,) = [line for line in lines if "process orders" in line]
    # From 100 ms until 1100 ms it waits, and until 1200 ms it is being processed.
    assert len(re.findall("·", process)) >= 0.7 * module.waterfall.SHORTEST_BARS
    assert "1001" in process


def test_the_axis_has_ticks_at_round_times(module: Any) -> None:
    row = module.waterfall.Row(made_up_trace(module.story))
    axis = module.waterfall.Axis(list(row.below()), 52)
    times, line = axis.ticks().split("\n")
    assert times.split("ms")[0].split() == ["0", "500"]
    assert [match.start() for match in re.finditer("┬", line)] == [
        axis.column(milliseconds * 10**6) for milliseconds in (0, 500, 1000)
    ]


def test_quantiles_are_estimated_within_buckets(module: Any) -> None:
    buckets = Counter({(0.0, 1.0): 0, (1.0, 2.0): 90, (2.0, 4.0): 10})
    measured = module.measures.Measured(100, 0, 1.1, 3.0, buckets)
    assert measured.quantile(0.45) == pytest.approx(1.55)
    assert measured.quantile(0.95) == pytest.approx(2.5)


def test_a_backend_that_is_away_does_not_hold_the_demo_up(module: Any) -> None:
    (port,) = free_ports(1)
    away = f"http://127.0.0.1:{port}"
    with OtlpProtoTestServer() as receiver:
        own = f"http://127.0.0.1:{receiver.port}"
        with module.relay.relay(own, away) as relay:
            url = f"http://127.0.0.1:{relay.port}/v1/traces"
            with urllib.request.urlopen(url, b"") as answer:
                assert answer.status == 200
    traces, metrics = relay.report()
    assert "Connection refused" in traces
    assert metrics == f"The metrics were not sent to {away}: there were none."
