"""The send span: from the call to the broker's acknowledgement, once."""

from __future__ import annotations

import enum
import functools
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import kafka.errors
import pytest
from embedded_broker import EmbeddedBroker
from kafka.producer.future import FutureProduceResult, FutureRecordMetadata
from opentelemetry import propagate, trace
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Decision, StaticSampler
from opentelemetry.trace import SpanKind, StatusCode

from clients import DEADLINE, VERSION, Clients, sends_large
from conftest import Instrument
from deliveries import assert_failed
from otel_kafka_python import KafkaPythonInstrumentor, _clients, _endings
from recorder import Log, Recorder, attributes_of

# Of the broker's limit, and above it; the client's own limit is lifted.
TOO_LARGE = 3_000_000


@pytest.fixture
def own_broker() -> Iterator[EmbeddedBroker]:
    """A broker that a test may kill or freeze."""
    with EmbeddedBroker() as broker:
        yield broker


@pytest.fixture
def own_clients(own_broker: EmbeddedBroker, topic: str) -> Iterator[Clients]:
    made = Clients(own_broker.address, topic)
    yield made
    made.close()


def impatient(**config: Any) -> dict[str, Any]:
    """A producer's configuration that gives up soon."""
    config = {"max_block_ms": 500, "request_timeout_ms": 1000, "retries": 0, **config}
    if VERSION >= (2, 2):
        config["delivery_timeout_ms"] = 1500
    if VERSION >= (3, 0):
        # With idempotence, its default, 3.0 never completes such futures.
        config["enable_idempotence"] = False
    return config


def test_a_send_makes_one_span_with_all_that_is_known(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer(client_id="orders")
    metadata = producer.send(topic, b"value", key=b"key").get(DEADLINE)
    producer.flush()

    assert recorder.names() == [f"send {topic}"]
    span = recorder.one(f"send {topic}")
    assert span.kind is SpanKind.PRODUCER
    assert span.status.status_code is StatusCode.UNSET
    assert span.parent is None
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "otel_kafka_python"
    assert (
        span.instrumentation_scope.schema_url
        == "https://opentelemetry.io/schemas/1.44.0"
    )
    host, port = clients.address.split(":")
    attributes: dict[str, Any] = dict(span.attributes or {})
    cluster_id = attributes.pop("messaging.kafka.cluster.id", None)
    assert isinstance(cluster_id, str) == (VERSION >= (2, 1))
    assert attributes == {
        "messaging.system": "kafka",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": topic,
        "messaging.destination.partition.id": str(metadata.partition),
        "messaging.client.id": "orders",
        "messaging.kafka.message.key": "key",
        "messaging.kafka.offset": metadata.offset,
        "server.address": host,
        "server.port": int(port),
        "network.peer.address": host,
        "network.peer.port": int(port),
    }


def test_the_span_ends_with_the_acknowledgement_and_not_with_the_call(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer(linger_ms=int(DEADLINE * 1000))
    producer.send(topic, b"value")
    assert recorder.open() == [f"send {topic}"]
    producer.flush()
    assert recorder.open() == []


def test_the_span_has_ended_before_the_applications_own_callbacks_run(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    seen = []
    producer = clients.producer(linger_ms=1000)
    future = producer.send(topic, b"value")
    future.add_callback(lambda metadata: seen.append((metadata, recorder.names())))
    producer.flush()
    assert seen == [(future.value, [f"send {topic}"])]


@pytest.mark.defect(7)
def test_a_sampler_sees_what_it_needs(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer()
    producer.send(topic, b"value", partition=0).get(DEADLINE)
    (creation,) = recorder.sampler.creations
    host, port = clients.address.split(":")
    assert creation.name == f"send {topic}"
    assert creation.kind is SpanKind.PRODUCER
    assert {
        "messaging.system": "kafka",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": topic,
        "messaging.destination.partition.id": "0",
        "server.address": host,
        "server.port": int(port),
    }.items() <= creation.attributes.items()


def test_the_span_is_a_child_of_the_current_one_and_not_current_itself(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer()
    with recorder.tracer.start_as_current_span("request") as request:
        producer.send(topic, b"value")
        assert trace.get_current_span() is request
        producer.flush()
    span = recorder.one(f"send {topic}")
    assert span.parent is not None
    assert span.parent.span_id == request.get_span_context().span_id


class _Partitioner:
    """Of the application's, as each version calls one."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work

    def __call__(self, *_: Any) -> int:
        self.work()
        return 0

    def partition(self, *_: Any, **__: Any) -> int:
        return self()


@pytest.mark.parametrize("role", ["key_serializer", "value_serializer", "partitioner"])
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "unsampled"])
@pytest.mark.filterwarnings("ignore:partitioner does not:DeprecationWarning")
def test_what_serialisers_and_a_partitioner_do_is_a_child_of_the_send(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    role: str,
    sampled: bool,
) -> None:
    provider = None if sampled else TracerProvider(ALWAYS_OFF, shutdown_on_exit=False)
    instrument(**({} if provider is None else {"tracer_provider": provider}))
    seen = []

    def work(value: bytes = b"") -> bytes:
        seen.append(trace.get_current_span().get_span_context())
        return value

    runs: Any = _Partitioner(work) if role == "partitioner" else work
    producer = clients.producer(**{role: runs})
    with recorder.tracer.start_as_current_span("request") as request:
        producer.send(topic, b"value", key=b"key")
        assert trace.get_current_span() is request
    producer.flush()
    (context,) = seen
    if sampled:
        span = recorder.one(f"send {topic}")
        assert context == span.context
        assert span.parent == request.get_span_context()
    else:
        assert context.trace_id == request.get_span_context().trace_id
        assert not context.trace_flags.sampled


def test_what_a_serialiser_raises_leaves_the_context_as_it_was(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    def fail(_: Any) -> bytes:
        raise LookupError("no schema")

    producer = clients.producer(value_serializer=fail)
    with recorder.tracer.start_as_current_span("request") as request:
        with pytest.raises(LookupError):
            producer.send(topic, b"value")
        assert trace.get_current_span() is request


def test_a_producer_that_runs_nothing_of_the_applications_makes_nothing_current(
    instrumented: None,
    clients: Clients,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attached: list[Any] = []
    monkeypatch.setattr("otel_kafka_python._producer.attach", attached.append)
    clients.send(b"value")
    assert attached == []


def test_a_tombstone_is_what_is_null_on_the_wire(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    plain = clients.producer()
    plain.send(topic, None, key=b"none is null")
    encoding = clients.producer(value_serializer=lambda value: b"null")
    encoding.send(topic, None, key=b"none is text")
    dropping = clients.producer(value_serializer=lambda value: None)
    dropping.send(topic, b"value", key=b"text is null")
    for producer in (plain, encoding, dropping):
        producer.flush()
    tombstones = {
        span.attributes["messaging.kafka.message.key"]: span.attributes.get(
            "messaging.kafka.message.tombstone"
        )
        for span in recorder.named(f"send {topic}")
        if span.attributes
    }
    assert tombstones == {
        "none is null": True,
        "none is text": None,
        "text is null": True,
    }


def test_an_illegal_topic_is_not_in_the_name(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    producer = clients.producer(max_block_ms=500)
    with pytest.raises((ValueError, kafka.errors.KafkaTimeoutError)) as raised:
        producer.send("no topic!", b"value")
    span = recorder.one("send")
    assert_failed(span, raised.value, raised.type.__qualname__)
    assert "messaging.destination.name" not in (span.attributes or {})


@pytest.mark.defect(15)
def test_a_send_without_a_topic_makes_no_span(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    with pytest.raises(TypeError, match="topic"):
        clients.producer().send()
    assert recorder.started == []


@pytest.mark.defect(14)
def test_bootstrap_servers_may_be_a_set(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    addresses = Clients({clients.address}, topic)
    try:
        addresses.send(b"value")
    finally:
        addresses.close()
    span = recorder.one(f"send {topic}")
    host, port = clients.address.split(":")
    assert span.attributes is not None
    assert span.attributes["server.address"] == host
    assert span.attributes["server.port"] == int(port)


def freeze(broker: EmbeddedBroker) -> None:
    os.kill(broker.pid, signal.SIGSTOP)
    os.waitpid(broker.pid, os.WUNTRACED)  # until it has stopped, it may answer


def test_what_send_raises_ends_the_span_and_is_no_attempt(
    instrumented: None, own_clients: Clients, own_broker: EmbeddedBroker,
    recorder: Recorder, topic: str,
) -> None:  # fmt: skip
    producer = own_clients.producer(**impatient())
    freeze(own_broker)
    with pytest.raises(kafka.errors.KafkaTimeoutError) as raised:
        producer.send(topic, b"value")
    assert_failed(recorder.one(f"send {topic}"), raised.value, "KafkaTimeoutError")
    assert recorder.count("messaging.client.sent.messages") == 0
    assert recorder.count(
        "messaging.client.operation.duration", error_type="KafkaTimeoutError"
    ) == 1  # fmt: skip


def test_a_closed_producer_ends_the_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer(max_block_ms=500)
    producer.close()
    # 2.0 does not look; its metadata never comes.
    with pytest.raises(
        (AssertionError, kafka.errors.IllegalStateError, kafka.errors.KafkaTimeoutError)
    ) as raised:
        producer.send(topic, b"value")
    span = recorder.one(f"send {topic}")
    assert_failed(span, raised.value, raised.type.__qualname__)


def test_an_unknown_partition_ends_the_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    with pytest.raises((AssertionError, ValueError)) as raised:
        clients.producer().send(topic, b"value", partition=99)
    assert_failed(recorder.one(f"send {topic}"), raised.value, raised.type.__qualname__)
    assert recorder.points("messaging.client.sent.messages") == []


def test_a_message_too_large_for_the_client(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer(max_request_size=1000)
    raised: BaseException
    if VERSION >= (3, 0):
        with pytest.raises(kafka.errors.MessageSizeTooLargeError) as info:
            producer.send(topic, bytes(2000))
        raised = info.value
    else:
        future = producer.send(topic, bytes(2000))
        assert future.is_done
        raised = future.exception
    span = recorder.one(f"send {topic}")
    assert_failed(span, raised, "MESSAGE_TOO_LARGE")
    assert "messaging.kafka.offset" not in (span.attributes or {})
    assert "network.peer.address" not in (span.attributes or {})
    assert recorder.count("messaging.client.sent.messages") == 0


@sends_large
def test_a_message_that_the_broker_refuses(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer(max_request_size=2 * TOO_LARGE)
    future = producer.send(topic, os.urandom(TOO_LARGE), key=b"big")
    with pytest.raises(kafka.errors.MessageSizeTooLargeError) as raised:
        future.get(DEADLINE)
    producer.flush()
    span = recorder.one(f"send {topic}")
    assert_failed(span, raised.value, "MESSAGE_TOO_LARGE")
    assert span.attributes is not None
    assert span.attributes["messaging.destination.partition.id"] == "0"
    assert span.attributes["network.peer.address"] == "127.0.0.1"
    assert "messaging.kafka.offset" not in span.attributes
    assert recorder.count(
        "messaging.client.sent.messages", error_type="MESSAGE_TOO_LARGE"
    ) == 1  # fmt: skip


@pytest.mark.defect(6)
def test_messages_that_expire_because_the_broker_is_gone(
    instrumented: None, own_clients: Clients, own_broker: EmbeddedBroker,
    recorder: Recorder, topic: str,
) -> None:  # fmt: skip
    producer = own_clients.producer(**impatient(linger_ms=100))
    producer.send(topic, b"first").get(DEADLINE)
    own_broker.kill()
    future = producer.send(topic, b"last")
    with pytest.raises(kafka.errors.KafkaError) as raised:
        future.get(DEADLINE)
    producer.flush(DEADLINE)
    delivered, lost = recorder.named(f"send {topic}")
    assert delivered.status.status_code is StatusCode.UNSET
    assert lost.attributes is not None
    error_type = lost.attributes["error.type"]
    assert error_type in {
        "KafkaTimeoutError", "KafkaConnectionError", "REQUEST_TIMED_OUT",
        "NETWORK_EXCEPTION", "NodeNotReadyError", "Cancelled",
    }  # fmt: skip
    assert_failed(lost, raised.value, str(error_type))
    assert "network.peer.address" not in lost.attributes
    assert lost.attributes["messaging.destination.partition.id"] == "0"
    assert recorder.open() == []


def test_messages_that_expire_before_they_are_sent_are_no_attempt(
    instrumented: None, own_clients: Clients, own_broker: EmbeddedBroker,
    recorder: Recorder, topic: str,
) -> None:  # fmt: skip
    """Of a frozen broker the first are sent, and those behind them are not."""
    producer = own_clients.producer(
        **impatient(linger_ms=0, max_in_flight_requests_per_connection=1)
    )
    producer.send(topic, b"warm").get(DEADLINE)
    freeze(own_broker)
    futures = [producer.send(topic, b"sent")]
    batch = next(iter(producer._accumulator._incomplete.all()))
    until(lambda: batch.drained is not None)
    futures.append(producer.send(topic, b"waiting"))
    for future in futures:
        with pytest.raises(kafka.errors.KafkaError):
            future.get(DEADLINE)
    until(lambda: not recorder.open())
    _, *failed = recorder.named(f"send {topic}")
    assert len(failed) == 2
    # The client's own time-out is no answer, whatever its name.
    for span in failed:
        assert "network.peer.address" not in (span.attributes or {})
    assert recorder.count("messaging.client.sent.messages") == 2


def test_messages_that_a_close_drops_are_no_attempt(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer(linger_ms=int(DEADLINE * 1000))
    producer.partitions_for(topic)
    future = producer.send(topic, b"dropped")
    # As `close` does where the time that it is given is over.
    producer._sender.force_close()
    producer._sender.join(DEADLINE)
    span = recorder.one(f"send {topic}")
    assert_failed(span, future.exception, "IllegalStateError")
    assert "network.peer.address" not in (span.attributes or {})
    assert recorder.count("messaging.client.sent.messages") == 0
    assert recorder.count(
        "messaging.client.operation.duration", error_type="IllegalStateError"
    ) == 1  # fmt: skip


@pytest.mark.skipif(VERSION < (2, 2), reason="nothing tells of a drop")
def test_messages_that_are_dropped_before_send_has_returned_are_no_attempt(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = kafka.KafkaProducer.send

    def send(producer: Any, *args: Any, **kwargs: Any) -> Any:
        future = plain(producer, *args, **kwargs)
        producer._sender.force_close()
        producer._sender.join(DEADLINE)
        return future

    monkeypatch.setattr(kafka.KafkaProducer, "send", send)
    instrument()
    producer = clients.producer(linger_ms=int(DEADLINE * 1000))
    future = producer.send(topic, b"dropped")
    assert_failed(recorder.one(f"send {topic}"), future.exception, "IllegalStateError")
    # 2.2 drains it for a broker that is ready, and may have sent it.
    attempts = recorder.count("messaging.client.sent.messages")
    assert attempts == 0 or VERSION[:2] == (2, 2)
    KafkaPythonInstrumentor().uninstrument()


def test_an_error_that_was_there_when_send_returned_is_no_brokers_answer(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As kafka-python refuses a message whose topic it may not write to."""
    error = kafka.errors.TopicAuthorizationFailedError(topic)

    def refuse(*_: Any, **__: Any) -> Any:
        result = FutureProduceResult(kafka.TopicPartition(topic, 0))
        future = FutureRecordMetadata(result, -1, None, None, -1, 5, -1)
        return future.failure(error)

    monkeypatch.setattr(kafka.KafkaProducer, "send", refuse)
    instrument()
    producer = clients.producer()
    with suppress_instrumentation():
        producer.partitions_for(topic)
    producer.send(topic, b"value")
    span = recorder.one(f"send {topic}")
    assert_failed(span, error, "TOPIC_AUTHORIZATION_FAILED")
    assert span.attributes is not None
    assert span.attributes["messaging.destination.partition.id"] == "0"
    assert "network.peer.address" not in span.attributes
    assert recorder.count("messaging.client.sent.messages") == 0
    KafkaPythonInstrumentor().uninstrument()


def test_where_nothing_answers_there_is_no_offset_and_no_peer(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"0", b"1")
    producer = clients.producer(acks=0)
    producer.send(topic, b"2").get(DEADLINE)
    producer.flush()
    span = recorder.named(f"send {topic}")[-1]
    assert span.attributes is not None
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes["messaging.destination.partition.id"] == "0"
    assert "messaging.kafka.offset" not in span.attributes
    assert "network.peer.address" not in span.attributes
    assert recorder.count("messaging.client.sent.messages") == 3


def until(happened: Callable[[], bool]) -> None:
    """Wait until something has happened on another thread."""
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class _Failing(SpanProcessor):
    """An exporter at its worst: what it raises is not even an Exception."""

    def on_end(self, span: ReadableSpan) -> None:
        raise SystemExit("from a processor")


def test_a_failing_processor_does_not_end_the_sender(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, log: Log
) -> None:
    recorder.tracer_provider.add_span_processor(_Failing())
    producer = clients.producer(linger_ms=50)
    for number in range(3):
        assert producer.send(topic, b"value").get(DEADLINE).offset == number
    producer.flush()
    (message,) = log.take()
    assert message.startswith("Failed to end an operation with its answer")


class _Subclass(kafka.KafkaProducer):  # type: ignore[misc]  # untyped
    def send(self, *args: Any, **kwargs: Any) -> Any:
        return super().send(*args, **kwargs)


def test_a_span_that_cannot_say_whether_it_is_recorded_ends(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
    log: Log,
) -> None:
    def is_recording(_: Span) -> bool:
        raise RuntimeError

    monkeypatch.setattr(Span, "is_recording", is_recording)
    instrument(metrics=False)
    clients.send(b"value")
    assert recorder.names() == [f"send {topic}"]
    assert log.take()[0].startswith("Failed to ask whether a span is recorded")


def test_a_subclass_is_traced_once(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer(_Subclass)
    producer.send(topic, b"value")
    producer.flush()
    assert recorder.names() == [f"send {topic}"]


def test_a_call_through_the_class_is_traced(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer()
    kafka.KafkaProducer.send(producer, topic, b"value")
    producer.flush()
    assert recorder.names() == [f"send {topic}"]


def test_a_producer_that_lives_already_is_traced(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer()
    instrument()
    producer.send(topic, b"value")
    producer.flush()
    assert recorder.names() == [f"send {topic}"]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_a_send_that_is_interrupted_has_an_error_and_no_exception(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    interrupt: type[BaseException],
) -> None:
    def serialise(_: Any) -> bytes:
        raise interrupt

    with pytest.raises(interrupt):
        clients.producer(value_serializer=serialise).send(topic, b"value")
    span = recorder.one(f"send {topic}")
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["error.type"] == interrupt.__name__
    assert span.events == ()


def test_a_hook_that_ends_the_application_leaves_no_span_open(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    def hook(*_: Any) -> None:
        raise KeyboardInterrupt

    instrument(produce_hook=hook)
    producer = clients.producer()
    with pytest.raises(KeyboardInterrupt):
        producer.send(topic, b"value")
    assert recorder.open() == []
    assert recorder.names() == [f"send {topic}"]


def test_a_key_too_long_to_be_written_as_digits_is_left_out(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer(key_serializer=lambda key: hex(key).encode())
    producer.send(topic, b"value", key=10**5000).get(DEADLINE)
    span = recorder.one(f"send {topic}")
    assert "messaging.kafka.message.key" not in (span.attributes or {})
    assert span.kind is SpanKind.PRODUCER


class _UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text today")


def test_an_exception_without_a_text_is_an_error_too(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, log: Log
) -> None:
    def fail(_: Any) -> bytes:
        raise _UnprintableError

    producer = clients.producer(value_serializer=fail)
    with pytest.raises(_UnprintableError):
        producer.send(topic, b"value")
    span = recorder.one(f"send {topic}")
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "_UnprintableError"
    log.take()


def test_without_propagators_nothing_is_produced_for_others(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    configured = propagate.get_global_textmap()
    propagate.set_global_textmap(CompositePropagator([]))
    try:
        clients.send(b"value")
    finally:
        propagate.set_global_textmap(configured)
    assert recorder.one(f"send {topic}").kind is SpanKind.CLIENT


@pytest.mark.skipif(VERSION < (2, 1), reason="the cluster's id is unknown")
def test_a_cluster_that_is_known_at_the_acknowledgement_alone_is_named(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer()
    producer._metadata.cluster_id = None
    producer.send(topic, b"value").get(DEADLINE)
    producer.flush()
    span = recorder.one(f"send {topic}")
    assert span.attributes is not None
    assert span.attributes["messaging.kafka.cluster.id"]


def test_the_peer_is_the_leader_at_the_acknowledgement(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    """The metadata is made to look refreshed: one embedded broker moves no leader."""
    producer = clients.producer(linger_ms=int(DEADLINE * 1000))
    # What is known of the leader then is not to be used again.
    for _ in range(2):
        producer.send(topic, b"value", partition=0)
        producer.flush()
    producer.send(topic, b"value", partition=0)
    cluster = producer._metadata
    leader = cluster.leader_for_partition
    node = cluster.broker_metadata(leader(kafka.TopicPartition(topic, 0)))
    moved = SimpleNamespace(host="192.0.2.1", port=9092)
    cluster.broker_metadata = lambda _: moved
    cluster._last_successful_refresh_ms += 1
    producer.flush()
    del cluster.broker_metadata
    _, before, span = recorder.named(f"send {topic}")
    assert before.attributes is not None
    assert before.attributes["network.peer.address"] == node.host
    assert span.attributes is not None
    assert span.attributes["network.peer.address"] == "192.0.2.1"
    assert span.attributes["server.address"] == node.host


def test_a_send_that_is_interrupted_after_it_was_given_up_ends_once(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def send(*_: Any, **__: Any) -> Any:
        _endings.abandon_all()
        raise KeyboardInterrupt

    monkeypatch.setattr(kafka.KafkaProducer, "send", send)
    instrument()
    with pytest.raises(KeyboardInterrupt):
        clients.producer().send(topic, b"value")
    span = recorder.one(f"send {topic}")
    assert span.attributes is not None
    assert span.attributes["error.type"] == "outcome_unknown"
    KafkaPythonInstrumentor().uninstrument()


def test_a_cluster_that_cannot_be_read_costs_the_peer_alone(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(_clients.Client, "leader", fail)
    instrument()
    clients.send(b"value")
    span = recorder.one(f"send {topic}")
    assert span.attributes is not None
    assert span.attributes["messaging.kafka.offset"] == 0
    assert "network.peer.address" not in span.attributes
    (message,) = log.take()
    assert message.startswith("Failed to read the metadata of a producer")


def test_a_layer_that_returns_no_future_ends_the_send(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kafka.KafkaProducer, "send", lambda *_, **__: "sent")
    instrument()
    assert clients.producer().send(topic, b"value") == "sent"
    recorder.one(f"send {topic}")
    (message,) = log.take()
    assert message.startswith("Failed to follow the delivery of a message")
    KafkaPythonInstrumentor().uninstrument()


def test_a_log_handler_that_raises_does_not_reach_the_application(
    instrument: Instrument, clients: Clients, topic: str, log: Log
) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("from a log handler")

    def hook(*_: Any) -> None:
        raise LookupError("from a hook")

    instrument(produce_hook=hook)
    handler = Handler()
    logging.getLogger("otel_kafka_python").addHandler(handler)
    try:
        clients.producer().send(topic, b"value").get(DEADLINE)
    finally:
        logging.getLogger("otel_kafka_python").removeHandler(handler)
    log.take()


def test_a_meter_provider_that_fails_costs_no_span(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str, log: Log
) -> None:
    class Broken(NoOpMeterProvider):
        def get_meter(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no meters today")

    instrument(meter_provider=type("Broken", (Broken,), {"__module__": "sdk"})())
    clients.send(b"value")
    recorder.one(f"send {topic}")
    (message,) = log.take()
    assert message.startswith("Failed to create the instruments")


def test_a_sampler_that_fails_costs_the_span_alone(
    instrument: Instrument, clients: Clients, recorder: Recorder, log: Log
) -> None:
    class Failing(StaticSampler):
        def should_sample(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("no samples today")

    sampler = Failing(Decision.DROP)
    instrument(tracer_provider=TracerProvider(sampler, shutdown_on_exit=False))
    clients.send(b"value")
    (message,) = log.take()
    assert message.startswith("Failed to start a span")
    assert recorder.count("messaging.client.sent.messages") == 1


class _Unreadable(int):
    """A key of a class that does not want to be read."""

    def __int__(self) -> int:
        raise RuntimeError("no number today")

    def __str__(self) -> str:
        raise RuntimeError("no text today")


class _UnreadableClass:
    """A key that is a proxy of nothing, as in a request that has ended."""

    @property  # type: ignore[misc]  # it is of a property that can be set
    def __class__(self) -> Any:
        raise RuntimeError("no class today")


@pytest.mark.parametrize("key", [_Unreadable, _UnreadableClass])
def test_a_key_that_cannot_be_read_is_left_out_and_costs_no_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, key: type
) -> None:
    producer = clients.producer(key_serializer=lambda _: b"key")
    for _ in range(2):
        producer.send(topic, b"value", key=key())
    producer.flush()
    assert recorder.open() == []
    assert [
        (span.attributes or {}).get("messaging.kafka.message.key")
        for span in recorder.named(f"send {topic}")
    ] == [None, None]


class _Partition(enum.IntEnum):
    FIRST = 0
    SECOND = 1


@functools.total_ordering
class _Integer:
    """An integer of another kind than Python's, as NumPy has them."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return self.number == other

    def __lt__(self, other: int) -> bool:
        return self.number < other

    def __hash__(self) -> int:
        return hash(self.number)

    def __int__(self) -> int:
        return self.number

    def __index__(self) -> int:
        return self.number


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (False, True),
        (_Partition.FIRST, _Partition.SECOND),
        (_Integer(0), _Integer(1)),
    ],
)
def test_a_partition_is_its_number_whatever_its_type(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    first: Any,
    second: Any,
) -> None:
    clients.create_topic(2)
    producer = clients.producer()
    partitions = [first, second, 0, 1]
    for partition in partitions:
        producer.send(topic, b"value", partition=partition).get(DEADLINE)
    producer.flush()
    assert [
        (span.attributes or {}).get("messaging.destination.partition.id")
        for span in recorder.named(f"send {topic}")
    ] == ["0", "1", "0", "1"]
    for number in ("0", "1"):
        assert (
            recorder.count(
                "messaging.client.sent.messages",
                messaging_destination_partition_id=number,
            )
            == 2
        )


@pytest.mark.parametrize("partition", [0.5, "0"])
def test_a_partition_that_is_no_number_of_one_is_left_out(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, partition: Any
) -> None:
    clients.create_topic(1)
    with pytest.raises(Exception):  # noqa: B017 (each version has another)
        clients.producer().send(topic, b"value", partition=partition).get(DEADLINE)
    (attributes,) = attributes_of([recorder.one(f"send {topic}")])
    assert "messaging.destination.partition.id" not in attributes
