"""An application under `opentelemetry-instrument`, its telemetry read back by OTLP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.test._otlp_test_server import OtlpProtoTestServer
from opentelemetry.trace import SpanKind, StatusCode

from clients import DEADLINE, Clients
from conformance import Seen, check_spans
from scripts import run

APPLICATION = """
    import sys
    from kafka import KafkaConsumer, KafkaProducer
    address, topic = sys.argv[1:3]
    producer = KafkaProducer(bootstrap_servers=address)
    producer.send(topic, b"value", key=b"key")
    producer.flush()
    consumer = KafkaConsumer(
        topic, bootstrap_servers=address, auto_offset_reset="earliest"
    )
    for record in consumer:
        assert record.value == b"value"
        break
    consumer.close()
"""


@pytest.fixture
def receiver() -> Iterator[OtlpProtoTestServer]:
    with OtlpProtoTestServer() as server:
        yield server


def launch(clients: Clients, receiver: OtlpProtoTestServer, **environ: str) -> str:
    done = run(
        APPLICATION,
        clients.address,
        clients.topic,
        launched=True,
        environ={
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_SERVICE_NAME": "application",
            **environ,
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def values_of(thing: Any) -> dict[str, Any]:
    """The attributes of a span or a link, as OTLP has them."""
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value"))
        for each in thing.attributes
    }


def as_seen(span: Any) -> Seen:
    return Seen(
        span.name,
        SpanKind(span.kind - 1),  # in OTLP 0 is none at all
        StatusCode(span.status.code),
        values_of(span),
        [values_of(link) for link in span.links],
    )


def test_an_unchanged_application_is_traced_and_measured(
    clients: Clients, receiver: OtlpProtoTestServer, topic: str
) -> None:
    errors = launch(clients, receiver, OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="kafka")
    assert errors == ""
    found = receiver.get_spans(2, DEADLINE)
    check_spans(as_seen(each.span) for each in found)
    spans: dict[str, Any] = {each.span.name: each for each in found}
    assert set(spans) == {f"send {topic}", f"process {topic}"}
    send, process = spans[f"send {topic}"].span, spans[f"process {topic}"].span
    assert process.trace_id == send.trace_id
    assert process.parent_span_id == send.span_id
    assert [link.span_id for link in process.links] == [send.span_id]
    scope = spans[f"send {topic}"].scope
    assert scope.name == "otel_kafka_python"
    metrics = {each.metric.name for each in receiver.drain_metrics()}
    assert metrics >= {
        "messaging.client.operation.duration",
        "messaging.client.sent.messages",
        "messaging.client.consumed.messages",
        "messaging.process.duration",
    }


def test_it_can_be_disabled_by_name(
    clients: Clients, receiver: OtlpProtoTestServer
) -> None:
    launch(
        clients, receiver, OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="kafka_python,kafka"
    )
    assert receiver.drain_spans() == []


def test_a_malformed_variable_is_one_warning(
    clients: Clients, receiver: OtlpProtoTestServer, topic: str
) -> None:
    errors = launch(
        clients,
        receiver,
        OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="kafka",
        OTEL_PYTHON_KAFKA_SEND_SPANS="perhaps",
    )
    assert errors.count("OTEL_PYTHON_KAFKA_SEND_SPANS") == 1
    assert len(receiver.get_spans(2, DEADLINE)) == 2
