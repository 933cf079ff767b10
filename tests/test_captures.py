"""What is captured on request: sizes, headers, queue times."""

from __future__ import annotations

import time
from typing import Any

import pytest
from opentelemetry import baggage, context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from clients import DEADLINE, Clients, poll, poll_records
from conftest import Instrument
from otel_kafka_python import _config, process_span
from otel_kafka_python._attributes import header_attributes, queue_seconds
from recorder import Recorder, attributes_of

pytestmark = pytest.mark.one_broker

SIZE = "messaging.message.body.size"
QUEUE_TIME = "kafka.record.queue_time"
QUEUE_TIME_MS = "kafka.record.queue_time_ms"


def _encode(value: str | None) -> bytes | None:
    return None if value is None else value.encode()


def process(clients: Clients, count: int = 1) -> None:
    for _ in clients.finite(count, group_id=clients.topic):
        pass


def headers_of(attributes: dict[str, Any]) -> dict[str, Any]:
    prefix = "messaging.header."
    return {
        name.removeprefix(prefix): value
        for name, value in attributes.items()
        if name.startswith(prefix)
    }


def test_nothing_is_captured_unless_asked_for(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    clients.send(b"value", headers=[("color", b"red")])
    process(clients)
    poll(clients.consumer())
    for attributes in attributes_of(recorder.ended):
        assert SIZE not in attributes
        assert QUEUE_TIME_MS not in attributes
        assert headers_of(attributes) == {}
    assert recorder.points(QUEUE_TIME) == []


@pytest.mark.cpython
def test_the_size_is_that_of_the_serialised_value(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(capture_message_size=True)
    producer = clients.producer(value_serializer=_encode)
    for value in ("zwölf", "", None):
        producer.send(topic, value, key=b"key").get(DEADLINE)
    producer.flush()
    process(clients, 3)
    for name in ("send", "process"):
        sizes = [
            (attributes.get(SIZE), attributes.get("messaging.kafka.message.tombstone"))
            for attributes in attributes_of(recorder.named(f"{name} {topic}"))
        ]
        assert sizes == [(6, None), (0, None), (None, True)]


def test_of_a_batch_what_is_the_same_stands_on_the_span_and_the_rest_on_the_links(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(capture_message_size=True, capture_headers="*")
    producer = clients.producer()
    for value in (b"1", b"22"):
        headers = [("value", value), ("same", b"same")]
        producer.send(topic, value, key=b"key", headers=headers)
    producer.flush()
    consumer = clients.consumer()
    ((_, records),) = poll(consumer).items()
    while len(records) < 2:
        recorder.ended.clear()
        consumer.seek_to_beginning(*consumer.assignment())
        ((_, records),) = poll(consumer).items()
    with process_span(records):
        pass
    for name in ("poll", "process"):
        span = recorder.one(f"{name} {topic}")
        (own,) = attributes_of([span])
        assert SIZE not in own
        assert headers_of(own) == {"same": ("same",)}
        assert own["messaging.kafka.message.key"] == "key"
        links = attributes_of(span.links)
        assert all("messaging.kafka.message.key" not in link for link in links)
        assert [link[SIZE] for link in links] == [1, 2]
        assert [headers_of(link) for link in links] == [
            {"value": ("1",)},
            {"value": ("22",)},
        ]


def test_a_batch_of_tombstones_has_that_on_its_spans(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument()
    producer = clients.producer()
    for key in (b"1", b"2"):
        producer.send(topic, None, key=key)
    producer.flush()
    with process_span(poll_records(clients.consumer(), 2)):
        pass
    span = recorder.one(f"process {topic}")
    (own,) = attributes_of([span])
    assert own["messaging.kafka.message.tombstone"] is True
    assert attributes_of(span.links) == [
        {"messaging.kafka.offset": 0, "messaging.kafka.message.key": "1"},
        {"messaging.kafka.offset": 1, "messaging.kafka.message.key": "2"},
    ]


def test_a_failed_send_has_size_and_tombstone_too(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(capture_message_size=True)
    producer = clients.producer(linger_ms=60000)
    futures = [producer.send(topic, value, key=b"k") for value in (b"value", None)]
    for future in futures:
        # No broker fails a send at a moment that is known.
        future.failure(RuntimeError("failed"))
    sizes = [
        (attributes.get(SIZE), attributes.get("messaging.kafka.message.tombstone"))
        for attributes in attributes_of(recorder.named(f"send {topic}"))
    ]
    assert sizes == [(5, None), (None, True)]


@pytest.mark.cpython
def test_headers_are_captured_by_name_as_lists_of_text(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(capture_headers="color, X-*, !x-none, !X-Secret*")
    clients.send(
        b"value",
        headers=[
            ("color", b"red"),
            ("color", "grün".encode()),
            ("Color", b"blue"),
            ("X-Tenant", b"\xff\xfe"),
            ("X-Secret-Key", b"secret"),
            ("X-Empty", b""),
            ("shape", b"round"),
        ],
    )
    process(clients)
    next(clients.consumer())
    for name in ("send", "process", "poll"):
        (attributes,) = attributes_of([recorder.one(f"{name} {topic}")])
        assert headers_of(attributes) == {
            "color": ("red", "grün"),
            "X-Tenant": ("\ufffd\ufffd",),
            "X-Empty": ("",),
        }


def test_the_propagators_own_fields_are_never_captured(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(capture_headers=["*"])
    token = context.attach(baggage.set_baggage("user", "secret"))
    clients.send(b"value", headers=[("tracestate", b"a=b"), ("color", b"red")])
    context.detach(token)
    record = next(clients.consumer())
    assert {name for name, _ in record.headers} == {"color", "traceparent", "baggage"}
    for span in recorder.ended:
        assert headers_of(dict(span.attributes or {})) == {"color": ("red",)}


def test_nor_is_the_baggage_of_a_propagator_with_a_header_for_each_entry(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(capture_headers="*")
    headers = [("uberctx-user", b"secret"), ("ot-baggage-user", b"secret")]
    clients.send(b"value", headers=headers)
    next(clients.consumer())
    for span in recorder.ended:
        assert headers_of(dict(span.attributes or {})) == {}


def test_captured_headers_are_there_for_samplers(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(capture_headers="color")
    clients.send(b"value", headers=[("color", b"red")])
    process(clients)
    assert [
        creation.attributes["messaging.header.color"]
        for creation in recorder.sampler.creations
    ] == [["red"], ["red"]]


@pytest.mark.parametrize(
    "headers",
    [
        None,
        (),
        {"color": b"red"},
        [("color",)],
        [["color", b"red"]],
        [("color", None)],
        [(b"color", b"red")],
        [("color\ud800", b"red")],
        ["color"],
        [None],
    ],
)
def test_what_is_no_header_is_left_out(headers: Any) -> None:
    assert header_attributes(headers, lambda name: True) == {}


@pytest.mark.parametrize(
    ("globs", "captured"),
    [
        ("*", {"a", "ab", "b"}),
        ("a*,!ab", {"a"}),
        ("!ab,a*", {"a"}),
        ("!a*", set()),
        ("", set()),
        ("A", set()),
    ],
)
def test_an_exclusion_wins_wherever_it_stands(globs: str, captured: set[str]) -> None:
    config = _config.load({"capture_headers": globs})
    assert {name for name in ("a", "ab", "b") if config.captures(name)} == captured


@pytest.mark.parametrize("way", ["loop", "next", "poll"])
@pytest.mark.cpython
def test_the_queue_time_is_the_time_since_the_records_timestamp(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str, way: str
) -> None:
    instrument(capture_queue_time=True)
    now = time.time()
    producer = clients.producer()
    for ago in (5, 3):
        producer.send(topic, b"value", timestamp_ms=int((now - ago) * 1000))
    producer.flush()
    consumer = clients.finite(2, group_id=topic)
    if way == "loop":
        for _ in consumer:
            pass
    elif way == "next":
        next(consumer)
        next(consumer)
    else:
        while not recorder.points(QUEUE_TIME) or recorder.count(QUEUE_TIME) < 2:
            poll(consumer)
    most = time.time() - now
    (point,) = recorder.points(QUEUE_TIME)
    assert point.count == 2
    # Timestamps are whole milliseconds.
    assert 3 <= point.min <= 3 + most + 0.002
    assert 5 <= point.max <= 5 + most + 0.002
    assert dict(point.attributes) == {
        "messaging.destination.name": topic,
        "messaging.destination.partition.id": "0",
        "messaging.consumer.group.name": topic,
    }
    times = [
        attributes[QUEUE_TIME_MS]
        for attributes in attributes_of(recorder.named(f"process {topic}"))
    ]
    if way != "loop":
        assert times == []
    else:
        first, second = times
        assert 5000 <= first <= 5000 + most * 1000 + 2
        assert 3000 <= second <= 3000 + most * 1000 + 2


@pytest.mark.cpython
@pytest.mark.one_client
def test_the_queue_time_of_a_message_without_a_context_is_on_its_process_span(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(capture_queue_time=True, propagation=False)
    now = time.time()
    clients.send(b"value", timestamp_ms=int((now - 5) * 1000))
    process(clients)
    most = time.time() - now
    (attributes,) = attributes_of([recorder.one(f"process {topic}")])
    assert 5000 <= attributes[QUEUE_TIME_MS] <= 5000 + most * 1000 + 2


def test_the_queue_time_is_measured_without_any_span(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(capture_queue_time=True, process_spans=False, receive_spans=False)
    clients.send(b"value")
    process(clients)
    assert recorder.count(QUEUE_TIME) == 1
    assert recorder.names() == [f"send {topic}"]


def test_the_queue_time_is_measured_of_what_is_not_sampled(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(
        capture_queue_time=True,
        tracer_provider=TracerProvider(ALWAYS_OFF, shutdown_on_exit=False),
    )
    clients.send(b"value")
    process(clients)
    assert recorder.count(QUEUE_TIME) == 1


@pytest.mark.cpython
def test_a_clock_that_is_ahead_makes_no_negative_time(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(capture_queue_time=True)
    clients.send(b"value", timestamp_ms=int((time.time() + 600) * 1000))
    process(clients)
    (point,) = recorder.points(QUEUE_TIME)
    assert point.max == 0
    (attributes,) = attributes_of([recorder.one(f"process {topic}")])
    assert attributes[QUEUE_TIME_MS] == 0


@pytest.mark.cpython
def test_the_queue_time_of_a_record_with_no_timestamp_is_not_measured(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(capture_queue_time=True)
    clients.send(b"value", timestamp_ms=-1)
    process(clients)
    assert recorder.points(QUEUE_TIME) == []


@pytest.mark.parametrize("timestamp", [None, -1, "now"])
def test_a_record_with_no_timestamp_has_no_queue_time(timestamp: object) -> None:
    assert queue_seconds(timestamp, time.time_ns()) is None
