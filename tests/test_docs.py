"""The README: its code runs, and its tables are what the code has."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.test._otlp_test_server import OtlpProtoTestServer

from clients import DEADLINE, Clients
from conftest import Instrument
from otel_kafka_python import _config, _semconv
from recorder import Recorder
from scripts import run

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def block(language: str, containing: str) -> str:
    (found,) = [each for each in blocks(language) if containing in each]
    return found


def test_the_application_runs_under_the_launcher(
    clients: Clients, topic: str, tmp_path: Path
) -> None:
    application = block("python", "a lamp")
    # A topic of its own, and the broker of the tests.
    application = application.replace("localhost:9092", clients.address)
    (tmp_path / "app.py").write_text(application.replace('"orders"', f'"{topic}"'))
    with OtlpProtoTestServer() as receiver:
        exports = block("sh", "OTEL_EXPORTER_OTLP_ENDPOINT").replace(
            "http://localhost:4318", f"http://127.0.0.1:{receiver.port}"
        )
        done = subprocess.run(
            ["sh", "-e", "-c", exports + block("sh", "python app.py")],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
            env={
                **os.environ,
                "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
                "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "kafka",
                "OTEL_LOGS_EXPORTER": "none",
            },
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "shipping a lamp\n"
        spans = receiver.get_spans(2, DEADLINE)
    assert {each.span.name for each in spans} == {f"send {topic}", f"process {topic}"}
    assert {
        attribute.value.string_value
        for each in spans
        for attribute in each.resource.attributes
        if attribute.key == "service.name"
    } == {"shop"}


def test_the_code_of_manual_use_runs(clients: Clients, topic: str) -> None:
    send = """
import sys
from kafka import KafkaProducer
producer = KafkaProducer(bootstrap_servers=sys.argv[1])
producer.send(sys.argv[2], b"value")
producer.send("heartbeats", b"value")
producer.close()
"""
    code = block("python", "ConsoleSpanExporter")
    done = run(code + send, clients.address, topic)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"name": "send ') == 1
    assert f'"name": "send {topic}"' in done.stdout
    assert '"app.shop": "north"' in done.stdout


def test_the_code_of_process_span_runs(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    def ship(value: bytes) -> None:
        raise ValueError(value)

    names: dict[str, Any] = {"ship": ship}
    exec(block("python", "def handle"), names)
    clients.send(b"lamp")
    for record in clients.consumer():
        with pytest.raises(ValueError, match="lamp"):
            names["handle"](record)
        break
    span = recorder.one(f"process {topic}")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "ValueError"


PREFIXES = {"messaging", "server", "network", "kafka"}


def test_the_view_keeps_only_what_it_names(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    reader = InMemoryMetricReader()
    names: dict[str, Any] = {
        "MeterProvider": lambda **settings: MeterProvider([reader], **settings)
    }
    code = block("python", "View(").replace(
        "from opentelemetry.sdk.metrics import MeterProvider\n", ""
    )
    exec(code, names)
    instrument(meter_provider=names["meter_provider"])
    clients.send(b"lamp")
    data = reader.get_metrics_data()
    assert data is not None
    (scope,) = data.resource_metrics[0].scope_metrics
    for metric in scope.metrics:
        for point in metric.data.data_points:
            assert dict(point.attributes or {}) == {
                "messaging.operation.name": "send",
                "messaging.destination.name": topic,
            }
    names["meter_provider"].shutdown()


def table(heading: str) -> list[list[str]]:
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\|(.*)\|$", section, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows[2:]]


def test_the_table_of_settings_is_complete() -> None:
    documented = {}
    for names, variable, default, _ in table("Settings"):
        for name in names.split(", "):
            documented[name.strip("`")] = (variable.strip("`"), default)
    documented.pop("tracer_provider")
    documented.pop("meter_provider")
    documented.pop("logger_provider")
    defaults = _config.Config()
    assert documented == {
        name: (
            "" if name.endswith("_hook") else f"OTEL_PYTHON_KAFKA_{name.upper()}",
            _config.shown(getattr(defaults, name)).lower(),
        )
        for name in _config._PARSERS
    }


def test_the_tables_name_every_attribute_and_metric_and_no_other() -> None:
    cells = [row[0] for heading in ("Spans", "Metrics") for row in table(heading)]
    documented = {
        name
        for cell in cells
        for name in re.findall(r"`([a-z_.]+)(?:<name>)?`", cell)
        if "." in name and name.split(".")[0] in PREFIXES
    } | {"error.type", *re.findall(r"`(exception\.\w+)`", README)}
    ours = {
        value
        for name, value in vars(_semconv).items()
        if name.isupper() and isinstance(value, str) and "." in value
    } - {_semconv.SCHEMA_URL}
    assert documented == ours


def test_the_convention_is_the_one_that_is_emitted() -> None:
    assert _semconv.SCHEMA_URL.endswith("/1.44.0")
    assert "1.44.0, to the letter" in README


@pytest.mark.parametrize("line", ["tox -q -e demo", "tox -q -e tests"])
def test_ci_runs_the_readmes_lines(line: str) -> None:
    root = Path(__file__).parent.parent
    assert block("sh", line).count("\n") == 1
    assert f"grep -m 1 -- '{line}' README.md" in (root / ".ci" / "run").read_text()
