"""The Grafana dashboard, against what a Prometheus exporter serves for the demo."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from opentelemetry.test._otlp_test_server import OtlpProtoTestServer

from apache_broker import free_ports
from backends import found, why_unavailable
from clients import DEADLINE, sends_large

# The demo needs a broker that refuses one of its orders, and a client that sends it.
pytestmark = [sends_large, pytest.mark.one_client]

EXAMPLES = Path(__file__).parent.parent / "examples"
DASHBOARD = json.loads((EXAMPLES / "grafana-dashboard.json").read_text())
EXPRESSIONS = [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
]
# A metric, with the labels that are matched; none within `by (…)` and `on (…)`.
SELECTOR = r"\b((?:messaging|kafka)_\w+)(?:\{(.*?)\})?"
SERVICES = ("payments", "shipping", "orders")
# Prometheus adds these to what it scrapes.
OF_A_PROCESS = {"job", "instance"}


def grouped_by(expression: str) -> set[str]:
    names = ",".join(re.findall(r"by \((.*?)\)", expression))
    return {name.strip() for name in names.split(",")}


def matched(expression: str) -> dict[str, set[str]]:
    """The labels that are matched of each metric."""
    found: dict[str, set[str]] = {}
    without_groups = re.sub(r"(?:by|on) \(.*?\)", "", expression)
    for metric, matchers in re.findall(SELECTOR, without_groups):
        names = re.findall(r"(\w+)\s*(?:=|!)", matchers)
        found.setdefault(metric, set()).update(names)
    return found


@pytest.fixture(scope="module")
def served(demo: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the services of the demo serve, in the text format of Prometheus."""
    ports = free_ports(3)
    with ExitStack() as stack:
        broker = stack.enter_context(demo.EmbeddedBroker())
        receiver = stack.enter_context(OtlpProtoTestServer())
        log = stack.enter_context((tmp_path_factory.mktemp("demo") / "log").open("wb"))
        for name, port in zip(SERVICES, ports, strict=True):
            process = stack.enter_context(
                demo.service(
                    name,
                    broker,
                    receiver,
                    log,
                    "-i",  # it stays there at its end, so that all can be seen
                    OTEL_METRICS_EXPORTER="prometheus",
                    OTEL_EXPORTER_PROMETHEUS_HOST="127.0.0.1",
                    OTEL_EXPORTER_PROMETHEUS_PORT=str(port),
                    OTEL_PYTHON_KAFKA_CLIENT_METRICS="true",
                    OTEL_PYTHON_KAFKA_PIPELINE_LATENCY="true",
                    OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="kafka",
                )
            )
            if name != "orders":
                demo.wait_until_ready(name, process)
        return "\n".join(
            wait_for(port, name) for name, port in zip(SERVICES, ports, strict=True)
        )


def wait_for(port: int, service: str) -> str:
    """The metrics of a service, once it has handled what the demo sends."""
    last = {
        "payments": 'messaging_client_sent_messages_total{.*"send".* 3',
        "shipping": 'operation_duration_seconds_count{.*"commit".*',
        "orders": "messaging_client_sent_messages_total{.*error_type=.* 1",
    }[service]
    deadline = time.monotonic() + DEADLINE
    text = "nothing answers"
    while True:
        # Nobody has waited for `orders` to begin.
        with (
            suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response,
        ):
            text = response.read().decode()
        if re.search(last, text):
            return text
        assert time.monotonic() < deadline, text
        time.sleep(0.05)


def label_sets(served: str, metric: str) -> Iterator[set[str]]:
    for labels in re.findall(rf"^{metric}\{{(.*)\}} ", served, re.MULTILINE):
        yield set(re.findall(r'(\w+)="', labels))


def test_there_is_something_to_show() -> None:
    assert len(EXPRESSIONS) >= 9
    assert all(matched(expression) for expression in EXPRESSIONS)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_each_metric_and_label_is_one_that_is_served(
    served: str, expression: str
) -> None:
    grouped = grouped_by(expression)
    seen = set()
    for metric, wanted in matched(expression).items():
        found = list(label_sets(served, metric))
        assert found, f"{metric} is not served"
        assert any(wanted <= names for names in found), f"{wanted} of {metric}: {found}"
        seen |= set.union(*found)
    assert grouped <= seen | OF_A_PROCESS


def test_the_legends_name_labels_of_their_expressions() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            # What is the most of some series has only the labels by which it is.
            outermost = re.match(r"max by \(.*?\)", target["expr"])
            result = outermost[0] if outermost else target["expr"]
            assert named == grouped_by(result) - {"le"} - OF_A_PROCESS


# What comes in a minute, as a service, a topic, a group, messages, and seconds in all:
# of the latency since the first send, of waiting and of processing.
MEASURED = {
    ("payments", "orders", "payments"): (40, 160, 40, 40),
    ("payments-2", "orders", "payments"): (20, 200, 20, 20),
    ("shipping", "payments", "shipping"): (60, 60 * 20, 60 * 3, 60 * 2),
    ("mail", "shipments", "mail"): (60, 60 * 21, 60 * 2, 60 * 1),
    ("idle", "other", "idle"): (0, 0, 0, 0),
}
PARTS = (
    "kafka_pipeline_latency",
    "kafka_record_queue_time",
    "messaging_process_duration",
)
SENT = {
    ("orders", "orders"): 60,
    ("payments", "payments"): 40,
    ("payments-2", "payments"): 20,
    ("shipping", "shipments"): 60,
    ("idle", "payments"): 20,
}


def made_up() -> Iterator[tuple[str, int]]:
    """Series, and by how much each grows in a minute."""
    for (service, topic, group), figures in MEASURED.items():
        count, *sums = figures
        labels = f'job="{service}",instance="{service}:1",'
        labels += f'messaging_destination_name="{topic}",'
        labels += f'messaging_consumer_group_name="{group}"'
        for metric, total in zip(PARTS, sums, strict=True):
            yield f"{metric}_seconds_count{{{labels}}}", count
            yield f"{metric}_seconds_sum{{{labels}}}", total
    for (service, topic), count in SENT.items():
        labels = f'job="{service}",instance="{service}:1",'
        labels += f'messaging_destination_name="{topic}"'
        yield f"messaging_client_sent_messages_total{{{labels}}}", count


@pytest.mark.skipif(
    bool(why_unavailable("promtool")), reason=why_unavailable("promtool")
)
def test_handed_on_is_what_waiting_and_processing_leave(tmp_path: Path) -> None:
    """Payments are sent 15 seconds after the start, and orders paid after 6.

    Shipments are sent before their processing ends.
    """
    (handed_on,) = (
        target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
        if target["legendFormat"].endswith(" handed on")
    )
    names = 'messaging_consumer_group_name="{}", messaging_destination_name="{}"'
    expected = {("shipping", "payments"): 9, ("mail", "shipments"): 0}
    test = {
        "interval": "1m",
        "input_series": [
            {"series": series, "values": f"0+{more}x10"} for series, more in made_up()
        ],
        "promql_expr_test": [
            {
                "expr": f"round({handed_on.replace('$__rate_interval', '5m')})",
                "eval_time": "10m",
                "exp_samples": [
                    {"labels": f"{{{names.format(*hop)}}}", "value": seconds}
                    for hop, seconds in expected.items()
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"tests": [test]}))
    promtool = found("promtool")
    assert promtool is not None
    done = subprocess.run(
        [promtool, "test", "rules", "test.yaml"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def unread(written: Any, read: Any, path: str = "") -> Iterator[str]:
    """Where a value differs from the one that was read and written again."""
    if isinstance(written, dict) and isinstance(read, dict):
        for name, value in written.items():
            yield from unread(value, read.get(name), f"{path}.{name}")
    elif isinstance(written, list) and isinstance(read, list):
        for index, (one, other) in enumerate(zip_longest(written, read)):
            yield from unread(one, other, f"{path}[{index}]")
    elif written != read:
        yield path


def test_grafana_knows_each_field() -> None:
    """Grafana's own model drops what it does not know."""
    cog = "grafana_foundation_sdk.cog"
    pytest.importorskip(f"{cog}.plugins").register_default_plugins()
    encoder = pytest.importorskip(f"{cog}.encoder").JSONEncoder
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    read = encoder().encode(models.Dashboard.from_json(DASHBOARD))
    assert list(unread(DASHBOARD, json.loads(read))) == []


def test_the_alert_on_slow_pipelines_is_on_what_is_shown() -> None:
    """Each group counts by itself, so that quick hops do not hide a slow one."""
    rules = yaml.safe_load((EXAMPLES / "prometheus-rules.yaml").read_text())
    (alert,) = (
        rule["expr"].partition(" > ")[0]
        for rule in rules["groups"][0]["rules"]
        if rule["alert"] == "KafkaPipelineSlow"
    )
    shown = {
        "".join(each.replace("$__rate_interval", "5m").split()) for each in EXPRESSIONS
    }
    assert "".join(alert.split()) in shown


def test_a_metric_that_is_not_served_is_seen(served: str) -> None:
    assert list(label_sets(served, "messaging_client_sent_message_total")) == []
