"""Beside the contrib package, which is really installed: ours takes over."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, KafkaProducer
from opentelemetry.instrumentation.kafka import KafkaInstrumentor

from clients import IS_NG, Clients
from conftest import Instrument
from otel_kafka_python import KafkaPythonInstrumentor
from recorder import Log, Recorder
from scripts import run

pytestmark = pytest.mark.one_broker

WARNING = "opentelemetry-instrumentation-kafka-python was active too"

# Sends one message, takes it in a loop, and says who has traced what.
APPLICATION = """
    import sys
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import (
        ConsoleSpanExporter, SimpleSpanProcessor
    )
    line = lambda span: f"{span.instrumentation_scope.name} {span.name}\\n"
    trace.get_tracer_provider().add_span_processor(
        SimpleSpanProcessor(ConsoleSpanExporter(formatter=line))
    )
    from kafka import KafkaConsumer, KafkaProducer
    address, topic = sys.argv[1:3]
    # Up to 2.3 it would ask for the version, and not wait long for the answer.
    config = dict(bootstrap_servers=address, api_version=(2, 5))
    producer = KafkaProducer(**config)
    producer.send(topic, b"value").get(30)
    producer.close()
    consumer = KafkaConsumer(topic, auto_offset_reset="earliest", **config)
    for record in consumer:
        print("headers", [name for name, _ in record.headers])
        break
    consumer.close()
"""

OURS = [
    "otel_kafka_python send {topic}",
    "headers ['traceparent']",
    "otel_kafka_python process {topic}",
]
THEIRS = [
    "opentelemetry.instrumentation.kafka {topic} send",
    "opentelemetry.instrumentation.kafka {topic} receive",
    "headers ['traceparent']",
]


# The other package knows nothing of kafka-python-ng.
skips_itself = pytest.mark.skipif(IS_NG, reason="the other skips itself")


@pytest.fixture
def contrib(recorder: Recorder) -> Iterator[Any]:
    instrumentor = KafkaInstrumentor()
    originals = [vars(KafkaProducer)["send"], vars(KafkaConsumer)["__next__"]]
    yield lambda: instrumentor.instrument(tracer_provider=recorder.tracer_provider)
    if instrumentor.is_instrumented_by_opentelemetry:
        instrumentor.uninstrument()
    if KafkaPythonInstrumentor().is_instrumented_by_opentelemetry:
        KafkaPythonInstrumentor().uninstrument()
    assert vars(KafkaProducer)["send"] is originals[0]
    assert vars(KafkaConsumer)["__next__"] is originals[1]


def send_and_loop(clients: Clients) -> None:
    clients.send(b"value")
    for _ in clients.consumer():
        break


@skips_itself
@pytest.mark.defect(18)
def test_instrumented_after_the_other_ours_takes_over(
    contrib: Any, instrument: Instrument, clients: Clients, recorder: Recorder,
    topic: str, log: Log,
) -> None:  # fmt: skip
    contrib()
    instrument()
    (message,) = log.take()
    assert message.startswith(WARNING)
    assert not KafkaInstrumentor().is_instrumented_by_opentelemetry
    send_and_loop(clients)
    assert recorder.names() == [f"process {topic}", f"send {topic}"]


@skips_itself
def test_instrumented_by_hand_before_the_other_ours_takes_over_at_the_first_use(
    instrument: Instrument, contrib: Any, clients: Clients, recorder: Recorder,
    topic: str, log: Log,
) -> None:  # fmt: skip
    instrument()
    contrib()
    producer = clients.producer()
    producer.send(topic, b"first").get(30)
    (message,) = log.take()
    assert message.startswith(WARNING)
    recorder.ended.clear()
    producer.send(topic, b"second").get(30)
    producer.flush()
    for _ in clients.consumer():
        break
    assert recorder.names() == [f"process {topic}", f"send {topic}"]


@skips_itself
def test_where_the_other_cannot_be_removed_both_trace_and_this_is_logged(
    contrib: Any, instrument: Instrument, clients: Clients, recorder: Recorder,
    topic: str, log: Log, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(self: Any) -> None:
        raise RuntimeError

    contrib()
    with monkeypatch.context() as patched:
        patched.setattr(KafkaInstrumentor, "uninstrument", fail)
        instrument()
        clients.send(b"value")
    (message,) = log.take()
    assert message.startswith("Failed to take over from opentelemetry-instrumentation")
    assert recorder.names() == [f"send {topic}", f"{topic} send"]
    KafkaPythonInstrumentor().uninstrument()


@skips_itself
def test_uninstrumenting_ours_leaves_the_others_layer(
    instrument: Instrument, contrib: Any, clients: Clients, recorder: Recorder,
    topic: str,
) -> None:  # fmt: skip
    instrument()
    contrib()
    KafkaPythonInstrumentor().uninstrument()
    clients.send(b"value")
    assert recorder.names() == [f"{topic} send"]


@pytest.fixture
def first(tmp_path: Path) -> Any:
    """Has a distribution's entry points come before all others."""

    def copy(name: str) -> Path:
        metadata: Any = distribution(name)
        shutil.copytree(metadata._path, tmp_path / Path(metadata._path).name)
        return tmp_path

    return copy


def launch(clients: Clients, *paths: Path, **environ: str) -> tuple[list[str], str]:
    done = run(
        APPLICATION,
        clients.address,
        clients.topic,
        launched=True,
        paths=paths,
        environ={
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
            # Its handler of the root logger would keep warnings from standard error.
            "OTEL_PYTHON_LOG_AUTO_INSTRUMENTATION": "false",
            **environ,
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def expected(lines: list[str], topic: str) -> list[str]:
    return [line.format(topic=topic) for line in lines]


@skips_itself
@pytest.mark.parametrize(
    "distribution_name",
    ["opentelemetry-instrumentation-kafka-python", "otel-kafka-python"],
)
def test_under_the_launcher_ours_takes_over_in_both_orders(
    clients: Clients, topic: str, first: Any, distribution_name: str
) -> None:
    printed, errors = launch(clients, first(distribution_name))
    assert printed == expected(OURS, topic)
    assert errors.count(WARNING) == 1
    assert "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS=kafka;" in errors


def test_with_the_other_disabled_there_is_no_warning(
    clients: Clients, topic: str
) -> None:
    printed, errors = launch(clients, OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="kafka")
    assert printed == expected(OURS, topic)
    assert WARNING not in errors


@skips_itself
def test_with_ours_disabled_the_other_stays(clients: Clients, topic: str) -> None:
    printed, errors = launch(
        clients, OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="kafka_python"
    )
    assert printed == expected(THEIRS, topic)
    assert WARNING not in errors


@pytest.mark.skipif(not IS_NG, reason="the other does not skip itself")
def test_where_the_other_skips_itself_there_is_nothing_to_say(
    clients: Clients, topic: str
) -> None:
    printed, errors = launch(clients)
    assert printed == expected(OURS, topic)
    assert WARNING not in errors


def test_with_all_disabled_nobody_traces(clients: Clients) -> None:
    printed, _ = launch(clients, OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="*")
    assert printed == ["headers []"]
