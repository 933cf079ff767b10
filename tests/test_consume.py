"""Loops, `poll` and `next`: what each makes, and what is current when."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition
from opentelemetry import baggage, context, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

from clients import DEADLINE, Clients, poll, poll_records
from conftest import Instrument
from otel_kafka_python import (
    KafkaPythonInstrumentor,
    _consumer,
    _messages,
    process_span,
)
from otel_kafka_python._config import load
from otel_kafka_python._processing import spans
from pages import section
from recorder import Log, Recorder, attributes_of


def current_name() -> str | None:
    return getattr(trace.get_current_span(), "name", None)


def ids(spans: list[ReadableSpan]) -> list[int]:
    return [span.context.span_id for span in spans if span.context]


def linked(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


@pytest.fixture
def two_partitions(clients: Clients) -> Clients:
    clients.create_topic(2)
    return clients


@pytest.mark.defect(9)
def test_a_loop_makes_a_process_span_that_is_current_in_its_body(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2", b"3", key=b"key")
    consumer = clients.consumer(client_id="payments", group_id=f"group-{topic}")
    current = []
    for record in consumer:
        current.append(current_name())
        if record.offset == 2:
            break
    assert current == [f"process {topic}"] * 3
    assert current_name() is None

    sends, spans = recorder.named(f"send {topic}"), recorder.named(f"process {topic}")
    assert [span.kind for span in spans] == [SpanKind.CONSUMER] * 3
    assert [span.parent and span.parent.span_id for span in spans] == ids(sends)
    assert [linked(span) for span in spans] == [[each] for each in ids(sends)]
    assert attributes_of(spans[0].links) == [{}]
    assert [span.status.status_code for span in spans] == [StatusCode.UNSET] * 3
    attributes: dict[str, Any] = attributes_of(spans)[1]
    attributes.pop("messaging.kafka.cluster.id", None)
    host, port = clients.address.split(":")
    assert attributes == {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": topic,
        "messaging.destination.partition.id": "0",
        "messaging.client.id": "payments",
        "messaging.consumer.group.name": f"group-{topic}",
        "messaging.kafka.message.key": "key",
        "messaging.kafka.offset": 1,
        "server.address": host,
        "server.port": int(port),
    }
    # What iteration has fetched ahead is nobody's yet.
    assert recorder.named(f"poll {topic}") == []


def test_a_process_span_ends_when_its_body_does(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2")
    open_in_body = []
    for record in clients.consumer():
        open_in_body.append(recorder.open())
        if record.offset == 1:
            break
    assert open_in_body == [[f"process {topic}"]] * 2
    assert recorder.open() == []


@pytest.mark.defect(10)
def test_under_another_span_the_process_span_is_its_child_and_links(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    with recorder.tracer.start_as_current_span("batch job") as job:
        for _ in clients.consumer():
            break
        assert trace.get_current_span() is job
    process = recorder.one(f"process {topic}")
    assert process.parent is not None
    assert process.parent.span_id == job.get_span_context().span_id
    assert linked(process) == ids(recorder.named(f"send {topic}"))


def test_baggage_of_the_message_is_current_in_the_body_only(
    instrumented: None, clients: Clients, topic: str
) -> None:
    token = context.attach(baggage.set_baggage("tenant", "blue"))
    clients.send(b"1")
    context.detach(token)
    for _ in clients.consumer():
        assert baggage.get_baggage("tenant") == "blue"
        break
    assert baggage.get_baggage("tenant") is None


class BaggageProcessor(SpanProcessor):
    """Sees the baggage in which spans start, as the processor for baggage does."""

    def __init__(self) -> None:
        self.seen: list[dict[str, object]] = []

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if span.name.startswith("process"):
            self.seen.append(dict(baggage.get_all(parent_context)))


@pytest.mark.one_broker
@pytest.mark.one_client
def test_a_span_processor_sees_the_baggage_of_the_message(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    processor = BaggageProcessor()
    recorder.tracer_provider.add_span_processor(processor)
    token = context.attach(baggage.set_baggage("tenant", "blue"))
    clients.send(b"1")
    context.detach(token)
    (record,) = poll_records(clients.consumer(), 1)
    with process_span(record):
        pass
    with recorder.tracer.start_as_current_span("batch job"), process_span(record):
        pass
    assert processor.seen == [{"tenant": "blue"}] * 2


def test_what_the_application_has_in_its_context_stays_in_the_body_and_is_no_parent(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    token = context.attach(context.set_value("own", 1))
    for _ in clients.consumer():
        assert context.get_value("own") == 1
        break
    context.detach(token)
    process = recorder.one(f"process {topic}")
    assert process.parent is not None
    assert [process.parent.span_id] == ids(recorder.named(f"send {topic}"))


@pytest.mark.defect(8)
def test_a_poll_makes_one_receive_span_with_a_link_for_each_message(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer()
    producer.send(topic, b"1", key=b"k0")
    producer.send(topic, None, key=b"k1")
    producer.send(topic, b"3")
    producer.flush()
    consumer = clients.consumer(client_id="shipping")
    poll(consumer)
    assert current_name() is None

    span = recorder.one(f"poll {topic}")
    assert span.kind is SpanKind.CLIENT
    assert span.parent is None
    assert linked(span) == ids(recorder.named(f"send {topic}"))
    assert attributes_of(span.links) == [
        {"messaging.kafka.offset": 0, "messaging.kafka.message.key": "k0"},
        {
            "messaging.kafka.offset": 1,
            "messaging.kafka.message.key": "k1",
            "messaging.kafka.message.tombstone": True,
        },
        {"messaging.kafka.offset": 2},
    ]
    (attributes,) = attributes_of([span])
    attributes.pop("messaging.kafka.cluster.id", None)
    host, port = clients.address.split(":")
    assert attributes == {
        "messaging.system": "kafka",
        "messaging.operation.name": "poll",
        "messaging.operation.type": "receive",
        "messaging.destination.name": topic,
        "messaging.destination.partition.id": "0",
        "messaging.client.id": "shipping",
        "messaging.batch.message_count": 3,
        "server.address": host,
        "server.port": int(port),
        "network.peer.address": host,
        "network.peer.port": int(port),
    }


def test_a_poll_of_one_message_has_it_on_the_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", key=b"key")
    poll(clients.consumer())
    (attributes,) = attributes_of(recorder.named(f"poll {topic}"))
    assert attributes["messaging.batch.message_count"] == 1
    assert attributes["messaging.kafka.offset"] == 0
    assert attributes["messaging.kafka.message.key"] == "key"
    assert attributes_of(recorder.one(f"poll {topic}").links) == [{}]


def test_a_poll_over_partitions_says_on_each_link_which(
    instrumented: None, two_partitions: Clients, recorder: Recorder, topic: str
) -> None:
    producer = two_partitions.producer()
    for partition in (0, 1):
        producer.send(topic, b"value", partition=partition).get(30)
    producer.flush()
    consumer = two_partitions.consumer()
    # Both partitions in one poll: wait until both have been fetched.
    consumer.poll(timeout_ms=0)
    seen: set[Any] = set()
    while len(seen) < 2:
        recorder.ended.clear()
        records = poll(consumer)
        seen = set(records)
        consumer.seek_to_beginning(*consumer.assignment())
    span = recorder.one(f"poll {topic}")
    assert "messaging.destination.partition.id" not in attributes_of([span])[0]
    assert {
        attributes["messaging.destination.partition.id"]
        for attributes in attributes_of(span.links)
    } == {"0", "1"}


def test_a_poll_over_topics_has_no_topic_in_its_name(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    other = f"{topic}-other"
    producer = clients.producer()
    for each in (topic, other):
        producer.send(each, b"value").get(30)
    consumer = clients.consumer(topic, other)
    consumer.poll(timeout_ms=0)
    seen: set[Any] = set()
    while len(seen) < 2:
        recorder.ended.clear()
        seen = set(poll(consumer))
        consumer.seek_to_beginning(*consumer.assignment())
    span = recorder.one("poll")
    assert "messaging.destination.name" not in attributes_of([span])[0]
    assert {
        attributes["messaging.destination.name"]
        for attributes in attributes_of(span.links)
    } == {topic, other}


def test_an_empty_poll_makes_nothing(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    recorder.ended.clear()
    consumer = clients.consumer(auto_offset_reset="latest")
    assert consumer.poll(timeout_ms=100) == {}
    assert recorder.ended == []
    assert recorder.count(
        "messaging.client.operation.duration", messaging_operation_name="poll"
    ) == 0  # fmt: skip


def test_next_makes_a_receive_span_of_a_single_message(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2", key=b"key")
    consumer = clients.consumer()
    records = [next(consumer), next(consumer)]
    assert current_name() is None
    assert [record.offset for record in records] == [0, 1]
    spans = recorder.named(f"poll {topic}")
    assert [linked(span) for span in spans] == [
        [each] for each in ids(recorder.named(f"send {topic}"))
    ]
    attributes = attributes_of(spans)[1]
    assert "messaging.batch.message_count" not in attributes
    assert attributes["messaging.kafka.offset"] == 1
    assert attributes["messaging.kafka.message.key"] == "key"
    assert attributes_of(spans[1].links) == [{}]


def test_a_loop_over_a_polled_batch_makes_process_spans_once(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2")
    records = poll_batch(clients)
    names = [current_name() for _ in records]
    assert names == [None, None]
    for _ in range(2):
        for _record in records:
            names.append(current_name())
    assert names[2:] == [f"process {topic}"] * 2 + [None] * 2
    assert len(recorder.named(f"process {topic}")) == 2
    assert current_name() is None


def poll_batch(clients: Clients) -> Any:
    ((_, records),) = poll(clients.consumer()).items()
    return records


def test_what_poll_returns_is_a_dict_of_lists(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    clients.send(b"1", b"2", b"3")
    plain = poll(clients.consumer())
    instrument()
    traced = poll(clients.consumer())
    partition = TopicPartition(topic, 0)
    assert type(traced) is dict
    assert traced == plain
    records = traced[partition]
    assert isinstance(records, list)
    assert records[1] == plain[partition][1]
    assert records[1:] == plain[partition][1:]
    assert type(records[1:]) is list
    assert len(records) == 3
    assert repr(records) == repr(plain[partition])
    assert json.dumps(records, default=str) == json.dumps(plain[partition], default=str)
    for copied in (
        copy.copy(records),
        copy.deepcopy(records),
        pickle.loads(pickle.dumps(records)),
        records.copy(),
        list(records),
    ):
        assert type(copied) is list
        assert copied == plain[partition]


def test_a_loop_over_a_record_leaves_it_to_be_changed_as_a_list(
    instrumented: None, clients: Clients
) -> None:
    clients.send(b"1", b"2", b"3")
    records = poll_batch(clients)
    seen = []
    for record in records:
        seen.append(record.value)
        records.pop()
    assert seen == [b"1", b"2"]


@pytest.mark.defect(19)
@pytest.mark.parametrize("way", ["poll", "next", "loop"])
def test_a_deserialisers_error_is_seen_and_raised(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, way: str
) -> None:
    clients.send(b"no JSON")
    consumer = clients.consumer(value_deserializer=json.loads)
    with pytest.raises(json.JSONDecodeError) as raised:
        if way == "poll":
            poll(consumer)
        elif way == "next":
            next(consumer)
        else:
            for _ in consumer:
                pass
    span = recorder.one("poll")
    assert span.kind is SpanKind.CLIENT
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == str(raised.value)
    assert attributes_of([span])[0]["error.type"] == "JSONDecodeError"
    assert recorder.count(
        "messaging.client.operation.duration", error_type="JSONDecodeError"
    ) == 1  # fmt: skip
    assert current_name() is None


@pytest.mark.cpython
def test_what_a_deserialiser_does_is_in_no_messages_trace(
    instrumented: None, clients: Clients
) -> None:
    seen = []

    def deserialise(value: bytes) -> bytes:
        seen.append(trace.get_current_span())
        return value

    clients.send(b"1", b"2", b"3")
    # The later ones are fetched when the first one's body has ended.
    consumer = clients.consumer(value_deserializer=deserialise, max_poll_records=1)
    for record in consumer:
        if record.offset == 2:
            break
    poll(clients.consumer(value_deserializer=deserialise))
    assert len(seen) >= 4
    assert set(seen) == {trace.INVALID_SPAN}


class Exit(BaseException):
    """As GreenletExit is."""


STOPS = [KeyboardInterrupt, SystemExit, asyncio.CancelledError, Exit]


@pytest.mark.parametrize("way", ["poll", "next", "loop"])
@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_of_the_application_is_no_failure_of_a_poll(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    way: str,
    stop: type[BaseException],
) -> None:
    def interrupt(_: bytes) -> None:
        raise stop

    clients.send(b"1")
    consumer = clients.consumer(value_deserializer=interrupt)
    with pytest.raises(stop):
        if way == "poll":
            poll(consumer)
        elif way == "next":
            next(consumer)
        else:
            for _ in consumer:
                pass
    assert recorder.names() == [f"send {topic}"]
    assert recorder.open() == []
    duration = "messaging.client.operation.duration"
    assert recorder.count(duration, messaging_operation_name="poll") == 0
    assert current_name() is None


def test_a_time_out_of_iteration_is_no_error(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(consumer_timeout_ms=3000)
    iterator = iter(consumer)
    assert [record.offset for record in iterator] == [0]
    with pytest.raises(StopIteration):
        next(consumer)
    assert recorder.open() == []
    assert [span.status.status_code for span in recorder.ended] == (
        [StatusCode.UNSET] * len(recorder.ended)
    )
    # It goes on after a time-out, as the consumer does.
    clients.send(b"2")
    assert [record.offset for record in iterator] == [1]


def test_the_iterator_has_the_consumers_attributes(
    instrumented: None, clients: Clients, topic: str
) -> None:
    consumer = clients.consumer()
    iterator = iter(consumer)
    assert iter(iterator) is iterator
    assert iterator.subscription() == consumer.subscription()
    with pytest.raises(AttributeError):
        iterator.nothing  # noqa: B018


def test_a_loop_that_cannot_be_traced_is_the_consumers_own(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(consumer: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(_consumer, "iterates_by_polls", fail)
    instrument(receive_spans=False)
    clients.send(b"value")
    (record,) = list(clients.finite(1))
    assert record.value == b"value"
    assert recorder.names() == [f"send {topic}"]
    (message,) = log.take()
    assert message.startswith("Failed to trace an iteration")


def test_an_iteration_that_begins_after_uninstrument_is_the_consumers_own(
    instrumented: None, clients: Clients
) -> None:
    consumer = clients.consumer()
    iterate = consumer.__iter__
    KafkaPythonInstrumentor().uninstrument()
    assert iterate() is consumer


def test_limit_the_iterator_is_no_consumer_and_takes_no_attributes(
    instrumented: None, clients: Clients
) -> None:
    consumer = clients.consumer()
    iterator: Any = iter(consumer)
    assert not isinstance(iterator, KafkaConsumer)
    with pytest.raises(AttributeError):
        iterator.name = "orders"
    assert "not an instance of `KafkaConsumer`" in section("limits", "Loops")


def test_the_iterator_of_a_consumer_copies_as_the_consumer_does(
    instrumented: None, clients: Clients, topic: str
) -> None:
    clients.send(b"1", b"2")
    iterator = iter(clients.consumer())
    assert next(iterator).offset == 0
    copied = copy.copy(iterator)
    assert copied.subscription() == {topic}
    assert next(copied).offset == 1


@pytest.mark.defect(11)
@pytest.mark.parametrize("way", ["loop", "next", "list", "poll", "send"])
def test_suppressed_there_is_nothing(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, way: str
) -> None:
    with suppress_instrumentation():
        clients.send(b"1")
        consumer = clients.consumer()
        if way == "poll":
            for records in poll(consumer).values():
                for _ in records:
                    assert current_name() is None
        elif way == "next":
            assert next(consumer).headers == []
        elif way == "list":
            assert [record.headers for record in list(clients.finite(1))] == [[]]
        elif way == "loop":
            for _ in consumer:
                assert current_name() is None
                break
    assert recorder.started == []
    assert recorder.reader.get_metrics_data() is None


class _Overriding:
    """What a subclass may do to each method, calling the one above it."""

    polled = 0
    stepped = 0

    def poll(self, *args: Any, **kwargs: Any) -> Any:
        self.polled += 1
        return super().poll(*args, **kwargs)  # type: ignore[misc]  # a mixin

    def __next__(self) -> Any:
        self.stepped += 1
        return super().__next__()  # type: ignore[misc]  # a mixin


@pytest.mark.parametrize("way", ["loop", "next", "poll"])
def test_a_subclass_is_traced_once_through_what_it_overrides(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, way: str
) -> None:
    subclass = type("Subclass", (_Overriding, KafkaConsumer), {})
    clients.send(b"1")
    consumer = clients.consumer(cls=subclass)
    if way == "loop":
        for _ in consumer:
            break
    elif way == "next":
        next(consumer)
    else:
        poll_records(consumer, 1)
    assert consumer.polled >= 1
    assert consumer.stepped == (0 if way == "poll" else 1)
    name = "process" if way == "loop" else "poll"
    assert recorder.names() == [f"{name} {topic}", f"send {topic}"]
    assert recorder.count("messaging.client.consumed.messages") == 1


class Polling(KafkaConsumer):  # type: ignore[misc]  # untyped
    """A subclass that steps by polls of its own."""

    def __init__(self, *topics: str, **config: Any) -> None:
        self.buffered: list[Any] = []
        super().__init__(*topics, **config)

    def __next__(self) -> Any:
        while not self.buffered:
            self.buffered = poll_records(self, 1)
        return self.buffered.pop(0)


@pytest.mark.cpython
def test_a_record_counts_once_in_a_loop_whose_steps_poll_publicly(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2", b"3")
    for record in clients.consumer(cls=Polling):
        assert current_name() == f"process {topic}"
        if record.offset == 2:
            break
    assert recorder.names() == [f"process {topic}"] * 3 + [f"send {topic}"] * 3
    assert recorder.count("messaging.client.consumed.messages") == 3


def test_a_record_counts_once_as_a_step_polls_publicly_outside_a_loop(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    next(clients.consumer(cls=Polling))
    assert recorder.names() == [f"poll {topic}", f"send {topic}"]
    assert recorder.count("messaging.client.consumed.messages") == 1


@pytest.mark.cpython
def test_a_step_that_polls_again_after_a_failure_counts_its_record_once(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    class Trying(Polling):
        tried = False

        def __next__(self) -> Any:
            if not self.tried:
                self.tried = True
                with pytest.raises((AssertionError, TypeError)):  # 2.x, 3.x
                    self.poll(max_records=1.5)
            return super().__next__()

    clients.send(b"1")
    for _ in clients.consumer(cls=Trying):
        break
    assert recorder.names() == ["poll", f"process {topic}", f"send {topic}"]
    assert recorder.one("poll").status.status_code is StatusCode.ERROR
    assert recorder.count("messaging.client.consumed.messages") == 1


@pytest.mark.cpython
def test_a_poll_that_keeps_the_offsets_is_a_poll_as_any_other(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2")
    for records in poll(clients.consumer(), update_offsets=False).values():
        for record in records:
            assert current_name() == f"process {topic}"
            if record.offset == 0:
                break
    assert len(recorder.named(f"poll {topic}")) == 1
    assert len(recorder.named(f"process {topic}")) == 1
    assert recorder.count("messaging.client.consumed.messages") >= 1


@pytest.mark.parametrize("number", [1, 3])
def test_a_sampler_sees_the_links_of_a_receive_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, number: int
) -> None:
    clients.send(*[b"value"] * number, key=b"key")
    records = poll_records(clients.consumer(), number)
    creations = [c for c in recorder.sampler.creations if c.name == f"poll {topic}"]
    seen = [link.context.span_id for each in creations for link in each.links]
    assert seen == ids(recorder.named(f"send {topic}"))
    # A sampler may look at them in any way.
    links = _messages.Links(load({}), records, topic, 0)
    assert [links[i].context.span_id for i in range(len(links))] == seen
    assert [link.context.span_id for link in links[-1:]] == seen[-1:]


@pytest.mark.parametrize("number", [1, 3])
def test_no_links_are_made_for_a_receive_span_that_is_not_sampled(
    instrument: Instrument, clients: Clients, monkeypatch: Any, number: int
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(_messages, "creation_context", made.append)
    instrument(tracer_provider=TracerProvider(ALWAYS_OFF, shutdown_on_exit=False))
    clients.send(*[b"value"] * number, key=b"key")
    poll_records(clients.consumer(), number)
    assert made == []


@pytest.mark.parametrize("legacy", [False, True], ids=["polling", "legacy"])
def test_a_loop_follows_the_metadata(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, legacy: bool
) -> None:
    """The metadata is made to look refreshed: one broker is of one cluster."""
    if legacy and "legacy_iterator" not in KafkaConsumer.DEFAULT_CONFIG:
        pytest.skip("only 2.0 and ng have another iterator")

    def arrive(value: bytes) -> bytes:
        if value == b"2":  # in the midst of a poll
            cluster.cluster_id = "another"
            cluster._last_successful_refresh_ms += 1
        return value

    config: dict[str, Any] = {"legacy_iterator": True} if legacy else {}
    consumer = clients.consumer(value_deserializer=arrive, **config)
    cluster = consumer._client.cluster
    clients.send(b"0")
    for record in consumer:
        if record.offset == 2:
            break
        clients.send(b"%d" % (record.offset + 1))
    _, before, after = attributes_of(recorder.named(f"process {topic}"))
    assert before.get("messaging.kafka.cluster.id") != "another"
    assert after["messaging.kafka.cluster.id"] == "another"


@pytest.mark.parametrize("flags", ["00", "01", None], ids=str)
def test_a_sampler_sees_the_attributes_of_a_process_span(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    flags: str | None,
) -> None:
    carried = f"00-{7:032x}-{8:016x}-{flags}".encode()
    headers = [] if flags is None else [("traceparent", carried)]
    with suppress_instrumentation():
        clients.producer().send(topic, b"value", b"key", headers).get(DEADLINE)
    for _ in clients.consumer():
        break
    (seen,) = [c for c in recorder.sampler.creations if c.name == f"process {topic}"]
    assert seen.attributes["messaging.kafka.message.key"] == "key"
    assert seen.attributes["messaging.kafka.offset"] == 0


def test_the_attributes_of_a_process_span_are_a_mapping_as_any_other() -> None:
    record = SimpleNamespace(key=b"key", offset=7, serialized_value_size=1)
    known = MappingProxyType({"messaging.system": "kafka"})
    seen = _messages.LazyAttributes(load({}), record, known, 0)
    expected = {
        "messaging.system": "kafka",
        "messaging.kafka.message.key": "key",
        "messaging.kafka.offset": 7,
    }
    assert seen == expected
    assert seen["messaging.kafka.offset"] == 7
    assert {**seen} == dict(seen.items()) == seen.copy() == expected
    assert repr(seen) == repr(seen.copy())
    seen.copy().clear()
    assert len(seen) == 3


def test_no_attributes_are_made_for_a_process_span_that_is_not_sampled(
    instrument: Instrument, clients: Clients, monkeypatch: Any
) -> None:
    made: list[Any] = []
    for module in (_messages, spans):
        monkeypatch.setattr(module, "describe", lambda *given: made.extend(given))
    instrument(tracer_provider=TracerProvider(ALWAYS_OFF, shutdown_on_exit=False))
    clients.send(b"1", b"2", key=b"key")
    current = []
    for record in clients.consumer():
        current.append(trace.get_current_span())
        if record.offset == 1:
            break
    assert [span.get_span_context().is_valid for span in current] == [True, True]
    assert made == []


@pytest.mark.parametrize("how", ["poll", "process"])
def test_of_a_large_batch_the_links_that_the_sdk_drops_are_counted(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, how: str
) -> None:
    limit = 128  # the SDK's own
    clients.send(*(b"value",) * (limit + 2))
    consumer = clients.consumer()
    records = poll_records(consumer, limit + 2)
    if how == "process":
        with process_span(records):
            pass
    else:
        polled: list[Any] = []
        while len(polled) < limit + 2:  # all of them by one poll
            recorder.ended.clear()
            consumer.seek_to_beginning()
            ((_, polled),) = poll(consumer).items()
    span = recorder.one(f"{how} {topic}")
    (attributes,) = attributes_of([span])
    assert attributes["messaging.batch.message_count"] == limit + 2
    offsets = [link["messaging.kafka.offset"] for link in attributes_of(span.links)]
    assert offsets == list(range(2, limit + 2))
    assert span.dropped_links == 2
