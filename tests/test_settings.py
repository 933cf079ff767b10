"""The settings that change what is traced, on a broker; the rest is in test_config."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pytest
from kafka import TopicPartition
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import Tracer, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from clients import DEADLINE, Clients, Finite, poll, poll_records
from collector import collect
from conftest import Instrument
from otel_kafka_python import (
    KafkaPythonInstrumentor,
    _endings,
    _operation,
    process_span,
)
from otel_kafka_python._config import Config
from recorder import Log, Recorder, attributes_of

pytestmark = pytest.mark.one_broker


@pytest.mark.parametrize("way", ["loop", "next", "list", "poll", "poll and loop"])
def test_excluded_topics_are_left_alone(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str, way: str
) -> None:
    instrument(excluded_topics=f"nothing, {topic[:-2]}*")
    clients.send(b"1")
    consumer = clients.consumer()
    if way == "loop":
        for each in consumer:
            assert trace.get_current_span() is trace.INVALID_SPAN
            record = each
            break
    elif way == "next":
        record = next(consumer)
    elif way == "list":
        (record,) = list(clients.finite(1))
    else:
        ((_, records),) = poll(consumer).items()
        assert type(records) is list
        for each in records:
            assert trace.get_current_span() is trace.INVALID_SPAN
            record = each
    assert record.headers == []
    assert recorder.started == []
    assert recorder.reader.get_metrics_data() is None


def test_an_excluded_topic_beside_another_is_as_if_absent(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    other = f"{topic}-other"
    instrument(excluded_topics=[other])
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
    (attributes,) = attributes_of([recorder.one(f"poll {topic}")])
    assert attributes["messaging.batch.message_count"] == 1


@pytest.mark.cpython
def test_a_loop_over_an_excluded_topic_beside_another_counts_the_other(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    other = f"{topic}-other"
    instrument(excluded_topics=[other])
    producer = clients.producer()
    for each in (topic, other):
        producer.send(each, b"value").get(30)
    consumer = clients.consumer(topic, other, cls=Finite)
    consumer.count = 2
    assert {record.topic for record in [*consumer]} == {topic, other}
    consumer.seek_to_beginning(*consumer.assignment())
    consumer.count = 2
    for _ in consumer:
        pass
    assert recorder.names() == [f"poll {topic}", f"process {topic}", f"send {topic}"]
    assert recorder.count("messaging.client.consumed.messages") == 2


@pytest.mark.parametrize("excluded", ["neither", "one", "both"])
def test_a_failed_poll_is_traced_unless_all_of_its_topics_are_excluded(
    instrument: Instrument, clients: Clients, recorder: Recorder, excluded: str
) -> None:
    topics = [f"{clients.topic}-{letter}" for letter in "ab"]
    number = {"neither": 0, "one": 1, "both": 2}[excluded]
    instrument(excluded_topics=topics[:number])
    consumer = clients.consumer()
    consumer.unsubscribe()
    consumer.assign([TopicPartition(each, 0) for each in topics])
    with pytest.raises((AssertionError, TypeError)):  # 2.x, 3.x
        consumer.poll(max_records=1.5)
    traced = int(number < 2)
    assert recorder.names() == ["poll"] * traced
    assert recorder.count("messaging.client.operation.duration") == traced


def test_without_process_spans_and_metrics_a_loop_leaves_no_trace(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(process_spans=False, receive_spans=False, metrics=False)
    clients.send(b"1")
    for record in clients.consumer():
        with process_span([record]):
            assert trace.get_current_span() is trace.INVALID_SPAN
        break
    assert recorder.names() == [f"send {topic}"]
    assert recorder.reader.get_metrics_data() is None


def test_without_receive_spans_a_failed_poll_is_measured(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(receive_spans=False)
    with pytest.raises((AssertionError, TypeError)):  # 2.x, 3.x
        clients.consumer().poll(max_records=1.5)
    assert recorder.names() == []
    assert recorder.count("messaging.client.operation.duration") == 1


@pytest.mark.cpython
def test_a_consume_hook_changes_nothing_of_what_a_loop_measures(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(process_spans=False, consume_hook=lambda *_: None)
    clients.send(b"1")
    for _ in clients.consumer():
        break
    assert recorder.count(
        "messaging.client.operation.duration", messaging_operation_name="poll"
    ) == 1  # fmt: skip


def test_a_consume_hook_that_ends_the_application_leaves_no_receipt_open(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    def hook(*_: Any) -> None:
        raise KeyboardInterrupt

    instrument(process_spans=False, consume_hook=hook)
    clients.send(b"1")
    with pytest.raises(KeyboardInterrupt):
        next(clients.consumer())
    assert recorder.open() == []
    assert recorder.one(f"poll {topic}")


def test_the_produce_hook_is_called_once_with_span_and_arguments(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    calls = []

    def hook(span: Any, args: Any, kwargs: Any) -> None:
        span.set_attribute("app.own", 1)
        calls.append((args, kwargs))

    instrument(produce_hook=hook)
    clients.send(b"1", key=b"key")
    assert calls == [((topic, b"1"), {"key": b"key"})]
    assert attributes_of([recorder.one(f"send {topic}")])[0]["app.own"] == 1


def test_a_hook_that_ends_the_application_does_so_where_nothing_is_recorded(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    def hook(*_: Any) -> None:
        raise KeyboardInterrupt

    provider = TracerProvider(ALWAYS_OFF, shutdown_on_exit=False)
    instrument(produce_hook=hook, metrics=False, tracer_provider=provider)
    with pytest.raises(KeyboardInterrupt):
        clients.producer().send(topic, b"value")


def test_what_the_produce_hook_replaces_stays_replaced(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    own = {"messaging.kafka.message.key": "***", "messaging.client.id": "***"}

    def hook(span: Any, args: Any, kwargs: Any) -> None:
        assert own.keys() <= span.attributes.keys()
        span.set_attributes(own)

    instrument(produce_hook=hook)
    clients.send(b"1", b"2", key=b"key")
    for attributes in attributes_of(recorder.named(f"send {topic}")):
        assert {**attributes, **own} == attributes
        assert attributes["messaging.destination.partition.id"] == "0"


def test_headers_that_the_produce_hook_adds_are_sent(
    instrument: Instrument, clients: Clients
) -> None:
    def hook(span: Any, args: Any, kwargs: Any) -> None:
        kwargs["headers"] = [("hook", b"1")]

    instrument(produce_hook=hook)
    clients.send(b"1")
    assert [name for name, _ in next(clients.consumer()).headers] == [
        "hook",
        "traceparent",
    ]


def next_records(consumer: Any) -> Iterator[Any]:
    while True:
        yield next(consumer)


def next_records_of_an_iterator(consumer: Any) -> Iterator[Any]:
    iterator = iter(consumer)
    while True:
        yield next(iterator)


def next_records_with_process_span(consumer: Any) -> Iterator[Any]:
    while True:
        record = next(consumer)
        with process_span(record):
            yield record


def looped(consumer: Any) -> Iterator[Any]:
    yield from (record for record in consumer)


def looped_over_polled(consumer: Any) -> Iterator[Any]:
    while True:
        for records in poll(consumer).values():
            yield from (record for record in records)


@pytest.mark.parametrize("process_spans", [True, False])
@pytest.mark.parametrize(
    "way",
    [
        *(next_records, next_records_of_an_iterator, next_records_with_process_span),
        *(looped, looped_over_polled),
    ],
)
@pytest.mark.cpython
def test_the_consume_hook_is_called_once_for_each_record(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    way: Callable[[Any], Iterator[Any]],
    process_spans: bool,
) -> None:
    calls = []

    def hook(span: Any, record: Any, args: Any, kwargs: Any) -> None:
        span.set_attribute("app.own", record.offset)
        calls.append((record, args, kwargs))

    instrument(consume_hook=hook, process_spans=process_spans)
    clients.send(b"1", b"2")
    consumer = clients.consumer()
    records = []
    for record in islice(way(consumer), 2):
        records.append(record)
    # Not before more is asked for it is known that nothing processes the last one.
    consumer.close()
    if way is looped_over_polled and not process_spans:
        assert calls == []
        return
    assert calls == [(record, (), {}) for record in records]
    is_processed = process_spans and way not in {
        next_records,
        next_records_of_an_iterator,
    }
    spans = recorder.named(f"{'process' if is_processed else 'poll'} {topic}")
    assert [attributes["app.own"] for attributes in attributes_of(spans)] == [0, 1]
    assert recorder.open() == []
    assert recorder.count("messaging.client.consumed.messages") == 2
    with_own = [span for span in recorder.ended if "app.own" in (span.attributes or {})]
    assert len(with_own) == 2


def in_a_worker(record: Any) -> None:
    """Process a record in a thread, as a worker behind a queue does."""

    def work() -> None:
        with process_span(record):
            pass

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result(DEADLINE)


@pytest.mark.parametrize("way", [next_records, looped, looped_over_polled])
@pytest.mark.cpython
def test_the_consume_hook_is_called_once_for_a_record_that_a_worker_processes_later(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    way: Callable[[Any], Iterator[Any]],
) -> None:
    calls: list[tuple[str, int]] = []
    instrument(
        consume_hook=lambda span, record, *_: calls.append((span.name, record.offset))
    )
    clients.send(b"1", b"2")
    consumer = clients.consumer()
    records = []
    for record in islice(way(consumer), 2):
        records.append(record)
    consumer.close()
    name = f"{'poll' if way is next_records else 'process'} {topic}"
    assert calls == [(name, 0), (name, 1)]
    recorder.ended.clear()
    for record in records:
        in_a_worker(record)
    assert recorder.names() == [f"process {topic}"] * 2
    assert calls == [(name, 0), (name, 1)]


def test_the_consume_hook_is_called_for_a_record_that_is_delivered_again(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    offsets: list[int] = []
    instrument(consume_hook=lambda span, record, *_: offsets.append(record.offset))
    clients.send(b"1")
    consumer = clients.consumer()
    first = next(consumer)
    consumer.seek(TopicPartition(topic, 0), 0)
    again = next(consumer)
    for record in (first, again):
        in_a_worker(record)
    consumer.close()
    assert (first.offset, again.offset) == (0, 0)
    assert offsets == [0, 0]


def test_the_consume_hook_remembers_a_limited_number_of_records(
    instrument: Instrument, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_operation.RecordHook, "REMEMBERED", 2)
    offsets: list[int] = []
    instrument(consume_hook=lambda span, record, *_: offsets.append(record.offset))
    clients.send(b"1", b"2", b"3")
    records = poll_records(clients.consumer(), 3)
    for record in [*records, *records[::-1]]:
        with process_span(record):
            pass
    assert offsets == [0, 1, 2, 0]


ENDS: dict[str, Callable[[Any, Clients], Any]] = {
    "poll": lambda consumer, _: consumer.poll(0),
    "iteration": lambda consumer, _: iter(consumer),
    "close": lambda consumer, _: consumer.close(),
    "uninstrument": lambda *_: KafkaPythonInstrumentor().uninstrument(),
    "the exit": lambda *_: _endings.abandon_all(),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_receive_span_that_waits_for_its_hook_lasts_as_long_as_the_call(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str, how: str
) -> None:
    names: list[str] = []
    instrument(consume_hook=lambda span, *_: names.append(span.name))
    clients.send(b"1")
    consumer = clients.consumer()
    next(consumer)
    returned = time.time_ns()
    assert recorder.open() == [f"poll {topic}"]
    ENDS[how](consumer, clients)
    assert names == [f"poll {topic}"]
    assert (recorder.one(f"poll {topic}").end_time or 0) <= returned
    duration = "messaging.client.operation.duration"
    assert recorder.count(duration, messaging_operation_name="poll") == 1


@pytest.mark.cpython
def test_a_receive_span_whose_consumer_is_dropped_ends_with_the_next_operation(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    names: list[str] = []
    instrument(consume_hook=lambda span, *_: names.append(span.name))
    clients.send(b"1")
    consumer = clients.consumer()
    next(consumer)
    clients._made.remove(consumer)
    del consumer
    collect()
    clients.send(b"2")
    assert names == [f"poll {topic}"]
    assert recorder.open() == []


def test_the_consume_hook_is_not_called_for_batches(
    instrument: Instrument, clients: Clients
) -> None:
    calls: list[Any] = []
    instrument(consume_hook=lambda *arguments: calls.append(arguments))
    clients.send(b"1")
    poll(clients.consumer())
    assert calls == []


@pytest.mark.cpython
def test_a_hook_that_raises_is_logged_once_and_harms_nobody(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str, log: Log
) -> None:
    def hook(*arguments: Any) -> None:
        raise RuntimeError("from a hook")

    instrument(produce_hook=hook, consume_hook=hook)
    clients.send(b"1", b"2")
    values = []
    for record in clients.consumer():
        values.append(record.value)
        if len(values) == 2:
            break
    assert values == [b"1", b"2"]
    assert recorder.open() == []
    assert [message.split(";")[0] for message in log.take()] == [
        "Failed to run the produce_hook",
        "Failed to run the consume_hook",
    ]


@pytest.mark.cpython
def test_without_receive_spans_poll_makes_none_and_loops_do(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(receive_spans=False)
    clients.send(b"1")
    for records in poll(clients.consumer()).values():
        for _ in records:
            pass
    assert recorder.names() == [f"process {topic}", f"send {topic}"]


def test_without_process_spans_loops_make_receive_spans_and_nothing_is_current(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(process_spans=False)
    clients.send(b"1")
    for _ in clients.consumer():
        assert trace.get_current_span() is trace.INVALID_SPAN
        break
    assert recorder.names() == [f"poll {topic}", f"send {topic}"]
    span = recorder.one(f"poll {topic}")
    assert len(span.links) == 1
    assert "messaging.batch.message_count" not in (span.attributes or {})
    assert span.start_time is not None
    assert span.end_time is not None
    duration = "messaging.client.operation.duration"
    # The poll that brought the record, if that is what the client's iteration does.
    for point in recorder.points(duration, messaging_operation_name="poll"):
        assert point.sum == (span.end_time - span.start_time) / 1e9


def test_without_capture_message_key_no_key_is_recorded(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(capture_message_key=False)
    clients.send(b"1", b"2", key=b"secret")
    poll(clients.consumer())
    for _ in clients.consumer():
        break
    links = [link for span in recorder.ended for link in span.links]
    for attributes in attributes_of([*recorder.ended, *links]):
        assert "messaging.kafka.message.key" not in attributes


@pytest.mark.parametrize("internal", ["__consumer_offsets", "__transaction_state"])
def test_the_topics_of_kafka_itself_are_excluded_unless_others_are(
    internal: str,
) -> None:
    assert Config().excludes(internal)
    assert not Config(excluded_topics=()).excludes(internal)
    assert not Config().excludes(f"{internal}_of_ours")


def test_messages_to_some_topics_can_be_left_without_headers(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    other = f"{topic}-other"
    instrument(propagation_excluded_topics=f"none,{topic[:-2]}*-oth?r")
    producer = clients.producer()
    for each in (topic, other):
        producer.send(each, b"value").get(30)
    found = {}
    for record in clients.consumer(topic, other):
        found[record.topic] = [name for name, _ in record.headers]
        if len(found) == 2:
            break
    assert found == {topic: ["traceparent"], other: []}
    (sent,) = recorder.named(f"send {other}")
    assert sent.kind is trace.SpanKind.CLIENT


def test_without_metrics_nothing_is_measured_but_what_is_asked_for(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(metrics=False, capture_queue_time=True, client_metrics=True)
    clients.send(b"1")
    next(clients.consumer())
    assert recorder.names() == [f"poll {topic}", f"send {topic}"]
    names = {metric.name for metric in recorder.metrics()}
    assert names
    assert {name.split(".")[1] for name in names} == {"consumer", "producer"}


def process_one(clients: Clients, **arguments: Any) -> Any:
    """Process one record, and return what the body had as the current context."""
    clients.send(b"1", **arguments)
    ((record,),) = poll(clients.consumer()).values()
    with process_span(record):
        return context.get_current()


WITHOUT_SPANS = {"tracer_provider": trace.NoOpTracerProvider()}


@pytest.mark.one_client
def test_without_an_sdk_the_context_of_the_processing_is_the_applications_own(
    instrument: Instrument, clients: Clients
) -> None:
    instrument(**WITHOUT_SPANS, metrics=False)
    assert process_one(clients) is context.get_current()


@pytest.mark.one_client
def test_without_an_sdk_the_baggage_of_the_message_is_current(
    instrument: Instrument, clients: Clients
) -> None:
    instrument(**WITHOUT_SPANS, metrics=False)
    current = process_one(clients, headers=[("baggage", b"tenant=blue")])
    assert baggage.get_all(current) == {"tenant": "blue"}


@pytest.mark.one_client
def test_without_an_sdk_the_consume_hook_is_called(
    instrument: Instrument, clients: Clients
) -> None:
    seen = []
    hook = lambda _, record, *__: seen.append(record.value)  # noqa: E731
    instrument(**WITHOUT_SPANS, metrics=False, consume_hook=hook)
    process_one(clients)
    assert seen == [b"1"]


@pytest.mark.one_client
def test_without_an_sdk_for_spans_the_processing_is_measured(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(**WITHOUT_SPANS)
    process_one(clients)
    assert recorder.count("messaging.process.duration") == 1


@pytest.mark.one_client
def test_without_metrics_the_processing_of_a_message_without_headers_has_a_span(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(metrics=False, propagation=False)
    current = process_one(clients)
    assert recorder.one(f"process {topic}").context == (
        trace.get_current_span(current).get_span_context()
    )
    assert recorder.points("messaging.process.duration") == []


@pytest.mark.one_client
def test_the_consume_hook_is_not_called_for_a_span_that_was_not_started(
    instrument: Instrument, clients: Clients, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no span")

    seen: list[Any] = []
    instrument(consume_hook=lambda *given: seen.append(given))
    clients.send(b"1")
    ((record,),) = poll(clients.consumer()).values()
    monkeypatch.setattr(Tracer, "start_span", fail)
    with process_span(record) as span:
        assert span is trace.INVALID_SPAN
    assert seen == []
    (line,) = log.take()
    assert line.startswith("Failed to start a span")
