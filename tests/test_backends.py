"""The demo's telemetry through a real Collector into a real Prometheus.

The Collector has the configuration of the examples, and Prometheus their alert rules.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType, SimpleNamespace
from typing import IO, Any

import pytest
import yaml
from embedded_broker import die_with_parent

from apache_broker import free_ports
from backends import found, why_unavailable
from clients import DEADLINE, sends_large

MISSING = why_unavailable("otelcol", "prometheus")
pytestmark = [
    sends_large,
    pytest.mark.one_client,
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]

EXAMPLES = Path(__file__).parent.parent / "examples"
# A minute of the rules is so many milliseconds here, and their thresholds are as much
# smaller, so that all that they wait for happens.
MINUTE_MS = 500
THRESHOLDS = {"> 60": "> 1", "> 1000": "> 2", "> 30": "> 0.5"}
RATE_INTERVAL = "5s"
# More orders come than can be paid: these every so many seconds, and a checkout.
RUSH = "10"
PACE = 0.6
PATIENCE = 2 * DEADLINE

# For the service `orders`: more to send, and a producer that has no luck at all.
PREPARE = "unlucky = KafkaProducer(bootstrap_servers=os.environ['BROKER'], "
PREPARE += "max_request_size=10 * MEGABYTE)\n"
CHECKOUT = "".join(
    f"exec(open({str(EXAMPLES / 'demo' / name)!r}).read())\n"
    for name in ("rush.py", "orders.py")
)
CHECKOUT += "_ = unlucky.send('images', bytes(3 * MEGABYTE))\n"


class Zipkin(HTTPServer):
    """Takes spans as Zipkin does, and keeps them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ZipkinHandler)
        self.spans: list[dict[str, Any]] = []


class ZipkinHandler(BaseHTTPRequestHandler):
    server: Zipkin

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.spans += json.loads(body)
        self.send_response(202)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


class Backends:
    """A Collector, what it exports to, and where it takes telemetry."""

    def __init__(self, directory: Path, zipkin: Zipkin) -> None:
        grpc, self.port, metrics, prometheus = free_ports(4)
        self.spans = zipkin.spans
        self.grpc = ("127.0.0.1", grpc)
        self._directory = directory
        self._api = f"http://127.0.0.1:{prometheus}/api/v1/"
        self._write("collector.yaml", self._collector(metrics, zipkin.server_port))
        self._write("prometheus.yaml", self._prometheus(metrics))
        (directory / "rules.yaml").write_text(hastened())
        self.commands = (
            ("otelcol", "--config", "collector.yaml"),
            (
                *("prometheus", "--config.file=prometheus.yaml"),
                f"--web.listen-address=127.0.0.1:{prometheus}",
                "--enable-feature=exemplar-storage",
            ),
        )

    def _write(self, name: str, content: Any) -> None:
        (self._directory / name).write_text(yaml.safe_dump(content))

    def _collector(self, metrics: int, zipkin: int) -> Any:
        config = yaml.safe_load((EXAMPLES / "collector.yaml").read_text())
        protocols = config["receivers"]["otlp"]["protocols"]
        protocols["grpc"]["endpoint"] = "{}:{}".format(*self.grpc)
        protocols["http"]["endpoint"] = f"127.0.0.1:{self.port}"
        exporters = config["exporters"]
        exporters["prometheus"]["endpoint"] = f"127.0.0.1:{metrics}"
        exporters["zipkin"]["endpoint"] = f"http://127.0.0.1:{zipkin}/api/v2/spans"
        # As the file says to do for Zipkin.
        traces = config["service"]["pipelines"]["traces"]
        traces["processors"].insert(0, "attributes/zipkin")
        traces["exporters"].append("zipkin")
        # Its own metrics would want another port.
        config["service"]["telemetry"] = {"metrics": {"level": "none"}}
        return config

    def _prometheus(self, metrics: int) -> Any:
        target = {"targets": [f"127.0.0.1:{metrics}"]}
        scrape = {"job_name": "otel", "honor_labels": True, "static_configs": [target]}
        return {
            "global": {"scrape_interval": "250ms", "evaluation_interval": "250ms"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [scrape],
        }

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"{self._api}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url) as response:
            return json.load(response)["data"]

    def has(self, expression: str) -> bool:
        """Whether a query of the dashboard returns a number."""
        query = expression.replace("$__rate_interval", RATE_INTERVAL)
        result = self.ask("query", query=query)["result"]
        return any(each["value"][1] not in {"NaN", "+Inf"} for each in result)

    def exemplars(self, metric: str) -> set[str]:
        """The traces of a metric's exemplars."""
        end = time.time()
        times = {"start": str(end - PATIENCE), "end": str(end)}
        series = self.ask("query_exemplars", query=metric, **times)
        return {e["labels"]["trace_id"] for each in series for e in each["exemplars"]}

    def firing(self) -> set[str]:
        alerts = self.ask("alerts")["alerts"]
        return {a["labels"]["alertname"] for a in alerts if a["state"] == "firing"}


def hastened() -> str:
    """The alert rules, with their times and thresholds made shorter."""
    rules = (EXAMPLES / "prometheus-rules.yaml").read_text()
    rules = re.sub(r"\b(\d+)m\b", lambda m: f"{int(m[1]) * MINUTE_MS}ms", rules)
    for threshold, smaller in THRESHOLDS.items():
        rules, count = re.subn(rf"{threshold}\b", smaller, rules)
        assert count == 1
    return rules


def wait_until(happens: Callable[[], bool], meanwhile: Callable[[], object]) -> None:
    """Wait until something happens, and do something else meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < deadline, happens
        meanwhile()


@contextmanager
def running(command: tuple[str, ...], directory: Path) -> Iterator[None]:
    program, *arguments = command
    place = found(program)
    assert place is not None
    with (directory / f"{program}.log").open("wb") as log:
        process = subprocess.Popen(
            [place, *arguments],
            cwd=directory,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
        )
        try:
            yield
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def backends(tmp_path: Path) -> Iterator[Backends]:
    with ExitStack() as stack:
        zipkin = stack.enter_context(Zipkin())
        thread = Thread(target=zipkin.serve_forever)
        thread.start()
        stack.callback(thread.join)
        stack.callback(zipkin.shutdown)
        made = Backends(tmp_path, zipkin)
        for command in made.commands:
            stack.enter_context(running(command, tmp_path))

        def answers() -> bool:
            try:
                socket.create_connection(("127.0.0.1", made.port)).close()
                socket.create_connection(made.grpc).close()
                made.ask("alerts")
            except OSError:
                return False
            return True

        wait_until(answers, lambda: time.sleep(0.05))
        yield made


@pytest.fixture
def orders(demo: ModuleType, backends: Backends, tmp_path: Path) -> Iterator[IO[bytes]]:
    """Takes what the service `orders` of the demo is to do next."""
    receiver = SimpleNamespace(port=backends.port)
    environ = {
        "ORDERS": RUSH,
        "OTEL_PYTHON_KAFKA_CLIENT_METRICS": "true",
        "OTEL_PYTHON_KAFKA_PIPELINE_LATENCY": "true",
        "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "kafka",
    }
    with ExitStack() as stack:
        broker = stack.enter_context(demo.EmbeddedBroker())
        log = stack.enter_context((tmp_path / "services.log").open("wb"))
        for name in ("payments", "shipping"):
            process = stack.enter_context(
                demo.service(name, broker, receiver, log, **environ)
            )
            demo.wait_until_ready(name, process)
        # It stays there at its end, and takes more.
        process = stack.enter_context(
            demo.service("orders", broker, receiver, log, "-i", **environ)
        )
        yield process.stdin


def test_every_query_and_alert_shows_what_it_should(
    backends: Backends, orders: IO[bytes]
) -> None:
    dashboard = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
    targets = [each for panel in dashboard["panels"] for each in panel["targets"]]
    (group,) = yaml.safe_load((EXAMPLES / "prometheus-rules.yaml").read_text())[
        "groups"
    ]
    silent = {rule["alert"] for rule in group["rules"]}
    empty = {target["expr"] for target in targets}
    assert backends.firing() == set()

    def all_are_seen() -> bool:
        silent.difference_update(backends.firing())
        empty.difference_update([each for each in empty if backends.has(each)])
        return not silent and not empty

    def check_out() -> None:
        orders.write(CHECKOUT.encode())
        orders.flush()
        time.sleep(PACE)

    orders.write(PREPARE.encode())
    try:
        wait_until(all_are_seen, check_out)
    except AssertionError:
        pytest.fail(f"not seen: {silent}, {empty}")
    # From a measurement to its trace.
    latency = "kafka_pipeline_latency_seconds_bucket"
    wait_until(
        lambda: (
            not backends.exemplars(latency).isdisjoint(
                span["traceId"] for span in backends.spans
            )
        ),
        lambda: time.sleep(PACE),
    )
    # Nothing more is sent, and what was is paid.
    wait_until(lambda: not backends.firing(), lambda: time.sleep(PACE))
    # And Zipkin draws its graph.
    peers = {
        span["name"].split()[0]: span.get("remoteEndpoint", {}).get("serviceName")
        for span in backends.spans
    }
    assert peers.pop("checkout") is None
    of_kafka = {name for name, peer in peers.items() if peer == "kafka"}
    assert of_kafka == {"send", "poll", "process", "commit"}
