"""An application under `opentelemetry-instrument`, its telemetry read back by OTLP."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from opentelemetry.test._otlp_test_server import OtlpProtoTestServer
from opentelemetry.trace import SpanKind, StatusCode

from clients import DEADLINE, Clients
from conformance import Seen, check_spans
from scripts import run

pytestmark = pytest.mark.one_broker

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

# It patches the standard library itself, as a program does that nobody changes for
# the launcher: what consumes waits while other greenlets go on.
GREENLETS = """
    {patch}
    import sys
    from opentelemetry import trace
    from kafka import KafkaConsumer, KafkaProducer
    address, topic = sys.argv[1:3]

    def consume():
        consumer = KafkaConsumer(
            topic,
            bootstrap_servers=address,
            auto_offset_reset="earliest",
            consumer_timeout_ms=30_000,
        )
        for record in consumer:
            assert record.value == b"value"
            break
        consumer.close()

    def produce():
        producer = KafkaProducer(bootstrap_servers=address)
        producer.send(topic, b"value", key=b"key").get(30)
        producer.close()

    {run}
    # At its exit Python 3.12 refuses gevent the thread that the exporter wants.
    trace.get_tracer_provider().force_flush()
"""
GEVENT = GREENLETS.format(
    patch="from gevent import monkey, spawn; monkey.patch_all()",
    run="both = [spawn(consume), spawn(produce)]; [each.get() for each in both]",
)
EVENTLET = GREENLETS.format(
    patch="import eventlet; eventlet.monkey_patch(); from eventlet import spawn",
    run="both = [spawn(consume), spawn(produce)]; [each.wait() for each in both]",
)


@pytest.fixture
def receiver() -> Iterator[OtlpProtoTestServer]:
    with OtlpProtoTestServer() as server:
        yield server


def launch(
    clients: Clients,
    receiver: OtlpProtoTestServer,
    application: str = APPLICATION,
    **environ: str,
) -> str:
    done = run(
        application,
        clients.address,
        clients.topic,
        launched=True,
        environ={
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_LOGS_EXPORTER": "none",
            # Python 3.12 refuses its handler the thread that it wants at the exit.
            "OTEL_PYTHON_LOG_AUTO_INSTRUMENTATION": "false",
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


@pytest.mark.two_clients
@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_greenlets_of_a_program_that_patches_itself_are_traced(
    clients: Clients, receiver: OtlpProtoTestServer, topic: str, library: str
) -> None:
    if find_spec(library) is None:  # nor imported here: eventlet warns of each fork
        pytest.skip(f"{library} is not installed")
    launch(
        clients,
        receiver,
        GEVENT if library == "gevent" else EVENTLET,
        OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="kafka",
    )
    found = receiver.get_spans(2, DEADLINE)
    spans: dict[str, Any] = {each.span.name: each.span for each in found}
    assert set(spans) == {f"send {topic}", f"process {topic}"}
    assert spans[f"process {topic}"].parent_span_id == spans[f"send {topic}"].span_id


def test_a_program_without_kafka_has_not_imported_it() -> None:
    """Nor what kafka imports where that is installed, as botocore is."""
    done = run(
        """
        import sys
        print(sorted({"kafka", "botocore", "boto3"} & set(sys.modules)))
        print("otel_kafka_python" in sys.modules)
        """,
        launched=True,
        environ={
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_PYTHON_LOG_AUTO_INSTRUMENTATION": "false",  # as in `launch`
            # The contrib package imports it.
            "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "kafka",
        },
    )
    assert (done.stdout, done.stderr) == ("[]\nTrue\n", "")


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
