"""A Java service between two of Python's, traced by OpenTelemetry's Java agent."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.test._otlp_test_server import OtlpProtoTestServer
from opentelemetry.trace import SpanContext

from apache_broker import ApacheBroker, cache, libraries
from clients import Clients
from conftest import Instrument
from recorder import Recorder

pytestmark = pytest.mark.one_client

AGENT = "io.opentelemetry.javaagent:opentelemetry-javaagent:2.33.1"
RELAY = Path(__file__).parent / "java" / "Relay.java"
TIMEOUT = 120


def agent() -> Path:
    """The agent's jar, which Maven fetches the first time."""
    _, name, version = AGENT.split(":")
    jar = cache() / f"{name}-{version}.jar"
    if not jar.is_file():
        with tempfile.TemporaryDirectory(dir=jar.parent) as scratch:
            command = ["mvn", "-q", "-B", "dependency:copy", f"-Dartifact={AGENT}"]
            command.append(f"-DoutputDirectory={scratch}")
            subprocess.run(command, check=True, timeout=600)
            (Path(scratch) / jar.name).replace(jar)
    return jar


@pytest.fixture
def classes(broker: Any, tmp_path: Path) -> str:
    """The class path of the service in Java."""
    if not isinstance(broker, ApacheBroker):
        pytest.skip("Java is run where Apache Kafka is")
    jars = f"{libraries()}/*"
    command = ["javac", "-cp", jars, "-d", str(tmp_path), str(RELAY)]
    subprocess.run(command, check=True, timeout=TIMEOUT)
    return f"{tmp_path}{os.pathsep}{jars}"


def relay(classes: str, address: str, source: str, target: str) -> list[Any]:
    """Have Java take a message and send it on; the spans that it exports."""
    with OtlpProtoTestServer() as receiver:
        options = {
            "otel.exporter.otlp.endpoint": f"http://127.0.0.1:{receiver.port}",
            "otel.exporter.otlp.protocol": "http/protobuf",
            "otel.logs.exporter": "none",
            "otel.metrics.exporter": "none",
            "otel.semconv-stability.opt-in": "messaging",
            "otel.instrumentation.common.messaging.experimental"
            ".receive-telemetry.enabled": "true",
        }
        done = subprocess.run(
            [
                "java",
                f"-javaagent:{agent()}",
                *(f"-D{name}={value}" for name, value in options.items()),
                *("-cp", classes, RELAY.stem, address, source, target),
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stderr
        # They are flushed at the exit.
        return [each.span for each in receiver.drain_spans()]


def ids(context: SpanContext | None) -> tuple[bytes, bytes]:
    """Of which trace and which span, as OTLP has them."""
    assert context is not None
    return context.trace_id.to_bytes(16, "big"), context.span_id.to_bytes(8, "big")


def ids_of(thing: Any) -> tuple[bytes, bytes]:
    """The same, of a span or a link of OTLP."""
    return thing.trace_id, thing.span_id


def test_a_message_goes_to_java_and_comes_from_java_in_one_trace(
    classes: str,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    instrument(pipeline_latency=True)
    target = f"{topic}-next"
    clients.send(b"value", headers=[("kept", b"header")])
    theirs = relay(classes, clients.address, topic, target)
    for record in clients.consumer(target):
        assert record.value == b"value"
        # It is forwarded with its headers, of which the context gives way to another.
        names = ["baggage", "kept", "traceparent"]
        assert sorted(name for name, _ in record.headers) == names
        break
    # Java hands on when its pipeline began, and where.
    (point,) = recorder.points("kafka.pipeline.latency")
    assert point.attributes == {
        "kafka.pipeline.source": topic,
        "messaging.destination.name": target,
    }

    # Both call the same by the same names.
    names = [f"poll {topic}", f"process {topic}", f"send {target}"]
    poll, process, send = sorted(theirs, key=lambda span: span.name)
    assert [span.name for span in (poll, process, send)] == names
    # From Python to Java.
    sent = ids(recorder.one(f"send {topic}").context)
    assert [ids_of(link) for link in (*poll.links, *process.links)] == [sent, sent]
    assert (process.trace_id, process.parent_span_id) == sent
    assert (send.trace_id, send.parent_span_id) == ids_of(process)
    # From Java to Python.
    received = recorder.one(f"process {target}")
    (link,) = received.links
    assert ids(received.parent) == ids(link.context) == ids_of(send)
    assert ids(received.context)[0] == sent[0]
