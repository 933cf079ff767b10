"""The latency of pipelines, from the first send to the end of each processing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry import baggage, context, metrics, propagate, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from clients import DEADLINE, VERSION, Clients, poll, poll_records
from collector import collect
from conftest import Instrument
from otel_kafka_python import (
    KafkaPythonInstrumentor,
    _endings,
    _kafka,
    _pipeline,
    process_span,
)
from otel_kafka_python._metrics import Metrics
from recorder import Log, Recorder
from scripts import forks, needs_fork

LATENCY = "kafka.pipeline.latency"
DAY = 24 * 3600.0
TRACEPARENT = ("traceparent", b"00-%032x-%016x-01" % (7, 7))


def began(seconds_ago: float, topic: str = "orders") -> bytes:
    """The baggage of a pipeline that began so long ago."""
    return b"kafka.pipeline=%d-%s" % (
        (time.time() - seconds_ago) * 1000,
        topic.encode(),
    )


def send_with(clients: Clients, *entries: bytes) -> None:
    """Send messages with such baggage, as if from another service."""
    with suppress_instrumentation():
        producer = clients.producer()
        for entry in entries:
            headers = [TRACEPARENT, ("baggage", entry)]
            producer.send(clients.topic, b"value", headers=headers)
        producer.flush()


def carried(record: Any) -> dict[str, object]:
    """The baggage of a record."""
    carrier = {name: value.decode() for name, value in record.headers}
    return dict(baggage.get_all(propagate.extract(carrier, Context())))


def received(clients: Clients, *topics: str) -> list[dict[str, object]]:
    """The baggage of the first record of each topic."""
    found: dict[str, dict[str, object]] = {}
    with suppress_instrumentation():
        consumer = clients.consumer(*topics)
        while len(found) < len(topics):
            for (name, _), records in poll(consumer).items():
                found.setdefault(name, carried(records[0]))
    return [found[name] for name in topics]


def loop(clients: Clients, *topics: str) -> None:
    for _ in clients.consumer(*topics):
        break


def sources(recorder: Recorder) -> dict[Any, int]:
    """How many messages were measured, by the topic of the first send."""
    return {
        point.attributes["kafka.pipeline.source"]: point.count
        for point in recorder.points(LATENCY)
    }


def test_it_is_off_unless_it_is_asked_for(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"value")
    assert received(clients, topic) == [{}]
    send_with(clients, began(5))
    for record in clients.consumer():
        if record.offset == 1:
            break
    assert recorder.points(LATENCY) == []


def test_a_send_writes_the_start_and_leaves_the_applications_context_alone(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    instrument(pipeline_latency=True)
    seen = []

    def serialize(value: bytes) -> bytes:
        seen.append(dict(baggage.get_all()))
        return value

    before = time.time_ns() // 1_000_000
    producer = clients.producer(value_serializer=serialize)
    token = context.attach(baggage.set_baggage("tenant", "blue"))
    try:
        current = context.get_current()
        producer.send(topic, b"value").get(DEADLINE)
        assert context.get_current() is current
    finally:
        context.detach(token)
    assert seen == [{"tenant": "blue"}]
    (entries,) = received(clients, topic)
    start, source = str(entries.pop("kafka.pipeline")).split("-", 1)
    assert entries == {"tenant": "blue"}
    assert before <= int(start) <= time.time_ns() // 1_000_000
    assert source == topic


Hop = Callable[[Any, Any, str], None]


def hop_loop(consumer: Any, producer: Any, target: str) -> None:
    for record in consumer:
        producer.send(target, record.value).get(DEADLINE)
        break


def hop_polled(consumer: Any, producer: Any, target: str) -> None:
    for records in poll(consumer).values():
        for record in records:
            producer.send(target, record.value).get(DEADLINE)


def hop_process_span(consumer: Any, producer: Any, target: str) -> None:
    (record,) = poll_records(consumer, 1)
    with process_span(record):
        producer.send(target, record.value).get(DEADLINE)


def hop_batch(consumer: Any, producer: Any, target: str) -> None:
    with process_span(poll(consumer)):
        producer.send(target, b"value").get(DEADLINE)


def hop_forwarded(consumer: Any, producer: Any, target: str) -> None:
    for record in consumer:
        producer.send(target, record.value, headers=record.headers).get(DEADLINE)
        break


def hop_forwarded_alone(consumer: Any, producer: Any, target: str) -> None:
    (record,) = poll_records(consumer, 1)
    producer.send(target, record.value, headers=record.headers).get(DEADLINE)


WITHOUT = {"process_spans": False, "metrics": False}


@pytest.mark.parametrize(
    ("hop", "settings"),
    [
        (hop_loop, {}),
        (hop_polled, {}),
        (hop_process_span, {}),
        (hop_batch, {}),
        (hop_forwarded, {}),
        (hop_forwarded_alone, {}),
        (hop_loop, WITHOUT),
        (hop_batch, WITHOUT),
    ],
)
def test_each_hop_keeps_the_start_and_is_measured_once(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    hop: Hop,
    settings: dict[str, Any],
) -> None:
    instrument(pipeline_latency=True, **settings)
    topics = [topic, f"{topic}-1", f"{topic}-2"]
    producer = clients.producer()
    producer.send(topic, b"value").get(DEADLINE)
    for source, target in pairwise(topics):
        consumer = clients.consumer(source)
        hop(consumer, producer, target)
        consumer.close()
    loop(clients, topics[-1])
    first, *later = received(clients, *topics)
    assert first["kafka.pipeline"]
    assert later == [first, first]
    let_go(producer, topic)
    for each in topics:
        (point,) = recorder.points(LATENCY, messaging_destination_name=each)
        assert (point.count, point.attributes["kafka.pipeline.source"]) == (1, topic)


@pytest.mark.one_broker
@pytest.mark.one_client
def test_a_task_that_outlasts_a_record_without_a_span_starts_a_pipeline(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    """Its context still has the scope of the record."""
    instrument(pipeline_latency=True, process_spans=False)
    send_with(clients, began(100))
    (record,) = poll_records(clients.consumer(), 1)
    producer = clients.producer()
    with process_span(record):
        task = copy_context()
    task.run(producer.send, f"{topic}-next", b"value").get(DEADLINE)
    (entries,) = received(clients, f"{topic}-next")
    assert str(entries["kafka.pipeline"]).endswith(f"-{topic}-next")


@pytest.mark.one_broker
@pytest.mark.one_client
def test_a_setting_that_changes_while_a_record_is_processed_starts_a_pipeline(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    instrument(process_spans=False)
    clients.send(b"value")
    (record,) = poll_records(clients.consumer(), 1)
    with process_span(record):
        KafkaPythonInstrumentor().uninstrument()
        instrument(pipeline_latency=True)
        clients.producer().send(f"{topic}-next", b"value").get(DEADLINE)
    (entries,) = received(clients, f"{topic}-next")
    assert str(entries["kafka.pipeline"]).endswith(f"-{topic}-next")


@pytest.mark.one_broker
@pytest.mark.one_client
def test_an_application_that_removes_the_baggage_starts_a_pipeline(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    instrument(pipeline_latency=True)
    send_with(clients, began(100))
    (record,) = poll_records(clients.consumer(), 1)
    producer = clients.producer()
    with process_span(record):
        token = context.attach(baggage.clear())
        producer.send(f"{topic}-next", b"value").get(DEADLINE)
        context.detach(token)
    (entries,) = received(clients, f"{topic}-next")
    assert str(entries["kafka.pipeline"]).endswith(f"-{topic}-next")


@pytest.mark.skipif(VERSION < (2, 2), reason="transactions came with 2.2")
@pytest.mark.one_client
def test_a_transaction_keeps_the_start(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    instrument(pipeline_latency=True)
    clients.send(b"value")
    producer = clients.producer(transactional_id=topic)
    producer.init_transactions()
    for record in clients.consumer():
        producer.begin_transaction()
        producer.send(f"{topic}-next", record.value)
        producer.commit_transaction()
        break
    first, second = received(clients, topic, f"{topic}-next")
    assert first == second != {}


def test_it_is_measured_at_the_end_of_the_processing_sampled_or_not(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(
        pipeline_latency=True,
        tracer_provider=TracerProvider(ALWAYS_OFF, shutdown_on_exit=False),
    )
    send_with(clients, began(100))
    for _ in clients.consumer(group_id=topic):
        assert recorder.points(LATENCY) == []
        break
    (point,) = recorder.points(LATENCY)
    assert 100 <= point.sum <= 100 + DEADLINE
    assert dict(point.attributes) == {
        "kafka.pipeline.source": "orders",
        "messaging.destination.name": topic,
        "messaging.consumer.group.name": topic,
    }


def test_the_process_span_is_its_exemplar(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(pipeline_latency=True)
    clients.send(b"value")
    loop(clients)
    (point,) = recorder.points(LATENCY)
    (exemplar,) = point.exemplars
    span = recorder.one(f"process {topic}").context
    assert span is not None
    assert (exemplar.trace_id, exemplar.span_id) == (span.trace_id, span.span_id)


@pytest.mark.one_broker
@pytest.mark.one_client
def test_it_ends_with_the_process_span_whose_duration_is_measured_too(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(pipeline_latency=True)
    send_with(clients, began(1))
    (record,) = poll_records(clients.consumer(), 1)
    with process_span(record):
        pass
    start = int(str(carried(record)["kafka.pipeline"]).partition("-")[0])
    ended = recorder.one(f"process {topic}").end_time
    assert ended is not None
    (point,) = recorder.points(LATENCY)
    assert point.sum == (ended - start * 1_000_000) / 1e9
    assert recorder.count("messaging.process.duration") == 1


@pytest.mark.one_broker
@pytest.mark.one_client
def test_without_process_spans_the_current_span_is_its_exemplar(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(pipeline_latency=True, process_spans=False)
    send_with(clients, began(1))
    records = poll_records(clients.consumer(), 1)
    with recorder.tracer.start_as_current_span("work") as work, process_span(records):
        pass
    (point,) = recorder.points(LATENCY)
    (exemplar,) = point.exemplars
    assert exemplar.span_id == work.get_span_context().span_id


def test_a_clock_that_is_behind_gives_no_negative_latency(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(pipeline_latency=True)
    send_with(clients, began(-600))
    loop(clients)
    (point,) = recorder.points(LATENCY)
    assert (point.count, point.sum, point.max) == (1, 0, 0)


WRONG = {
    "empty": b"kafka.pipeline=",
    "no topic": b"kafka.pipeline=%d-" % (time.time() * 1000),
    "no time": b"kafka.pipeline=-orders",
    "no number": b"kafka.pipeline=now-orders",
    "negative": b"kafka.pipeline=-1-orders",
    "other digits": "kafka.pipeline=\u0661\u0667-orders".encode(),
    "no legal topic": began(1, "a%20topic"),
    "no short topic": began(1, "t" * 250),
    "in the future": began(-2 * 3600),
    "too old": began(31 * DAY),
    "at the epoch": b"kafka.pipeline=0-orders",
    "beyond all numbers": b"kafka.pipeline=%s-orders" % (b"9" * 4000),
    "another name": began(1).replace(b"pipeline", b"pipelines"),
}


def test_an_entry_that_cannot_be_true_is_ignored(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str, log: Log
) -> None:
    instrument(pipeline_latency=True)
    send_with(clients, *WRONG.values())
    producer = clients.producer()
    starts = {}
    for name, record in zip(WRONG, clients.consumer(), strict=False):
        producer.send(f"{topic}-next", name.encode())
        if record.offset == len(WRONG) - 1:
            break
    producer.flush()
    assert recorder.points(LATENCY) == []
    with suppress_instrumentation():
        for record in poll_records(clients.consumer(f"{topic}-next"), len(WRONG)):
            starts[record.value.decode()] = str(carried(record)["kafka.pipeline"])
    assert starts.keys() == WRONG.keys()
    assert [
        n for n, each in starts.items() if not each.endswith(f"-{topic}-next")
    ] == []
    # OpenTelemetry's own propagator says of some that they are no baggage.
    assert all("baggage" in line.lower() for line in log.take())


def test_of_too_many_sources_the_later_ones_are_other(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(pipeline_latency=True)
    names = [f"source.{number}" for number in range(102)]
    send_with(clients, *(began(1, name) for name in [*names, names[0]]))
    for record in clients.consumer():
        if record.offset == len(names):
            break
    assert sources(recorder) == {
        **dict.fromkeys(names[1:100], 1),
        names[0]: 2,
        "_OTHER": 2,
    }


def test_an_excluded_topic_neither_adds_nor_measures(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(pipeline_latency=True, excluded_topics=topic)
    clients.send(b"value")
    assert received(clients, topic) == [{}]
    send_with(clients, began(1))
    for record in clients.consumer():
        if record.offset == 1:
            break
    poll(clients.consumer())
    next(clients.consumer())
    assert recorder.points(LATENCY) == []


@pytest.mark.parametrize(
    "setting", [{"propagation": False}, {"propagation_excluded_topics": "*"}]
)
def test_a_message_that_carries_no_context_carries_no_start(
    instrument: Instrument, clients: Clients, topic: str, setting: dict[str, Any]
) -> None:
    instrument(pipeline_latency=True, **setting)
    producer = clients.producer()
    for headers in ([], [TRACEPARENT]):
        producer.send(topic, b"value", headers=headers).get(DEADLINE)
    records = poll_records(clients.consumer(), 2)
    assert [record.headers for record in records] == [[], [TRACEPARENT]]


def test_a_batch_measures_each_message_and_hands_on_the_earliest_start(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(pipeline_latency=True)
    entries = [began(10, "a"), began(30, "b"), began(20, "b"), b"tenant=blue"]
    send_with(clients, *entries)
    records = poll_records(clients.consumer(), len(entries))
    producer = clients.producer()
    with process_span(records):
        producer.send(f"{topic}-all", b"value")
        for record in records:
            producer.send(
                f"{topic}-{record.offset}", b"value", headers=record.headers
            ).get(DEADLINE)
        assert recorder.points(LATENCY) == []
    assert sources(recorder) == {"a": 1, "b": 2}
    assert [
        each["kafka.pipeline"]
        for each in received(
            clients, f"{topic}-all", *(f"{topic}-{number}" for number in range(4))
        )
    ] == [
        entries[number].split(b"=")[1].decode() for number in (1, 0, 1, 2, 1)
    ]  # fmt: skip


@pytest.mark.one_broker
@pytest.mark.one_client
@pytest.mark.parametrize("form", ["one", "batch"])
def test_messages_of_no_pipeline_are_processed_as_ever(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str, form: str
) -> None:
    instrument(pipeline_latency=True)
    send_with(clients, b"tenant=blue")
    records = poll_records(clients.consumer(), 1)
    with process_span(records if form == "batch" else records[0]) as span:
        assert trace.get_current_span() is span
    recorder.one(f"process {topic}")
    assert recorder.points(LATENCY) == []


def let_go(producer: Any, topic: str) -> None:
    """Let go of what was handed over, and begin another operation."""
    collect()
    producer.send(f"{topic}-other", b"value")


@pytest.mark.parametrize("receive_spans", [True, False])
def test_what_is_only_received_has_arrived_when_it_was_handed_over(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    receive_spans: bool,
) -> None:
    instrument(pipeline_latency=True, receive_spans=receive_spans)
    send_with(clients, began(100), began(200), b"tenant=blue")
    producer = clients.producer()
    consumer = clients.consumer()
    values = [record.value for record in poll_records(consumer, 3)]
    assert len(values) == 3
    consumer.close()
    let_go(producer, topic)
    assert sources(recorder) == {"orders": 2}
    (point,) = recorder.points(LATENCY)
    assert 300 <= point.sum <= 300 + 2 * DEADLINE

    consumer = clients.consumer()
    next(consumer)
    assert sources(recorder) == {"orders": 2}
    next(consumer)
    assert sources(recorder) == {"orders": 3}
    consumer.close()
    let_go(producer, topic)
    assert sources(recorder) == {"orders": 4}

    consumer = clients.finite(3)
    assert len(list(consumer)) == 3
    consumer.close()
    let_go(producer, topic)
    assert sources(recorder) == {"orders": 6}


def test_the_receive_span_is_the_exemplar_of_what_is_only_received(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(pipeline_latency=True)
    producer = clients.producer()
    producer.send(topic, b"value").get(DEADLINE)
    consumer = clients.consumer()
    poll_records(consumer, 1)
    consumer.close()
    let_go(producer, topic)
    (point,) = recorder.points(LATENCY)
    (exemplar,) = point.exemplars
    span = recorder.one(f"poll {topic}").context
    assert span is not None
    assert exemplar.span_id == span.span_id


def test_what_is_received_and_then_processed_is_measured_once(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(pipeline_latency=True)
    send_with(clients, *(began(1) for _ in range(4)))
    consumer = clients.consumer()
    polled = poll(consumer, max_records=4)
    (records,) = polled.values()
    with process_span(records[0]):
        pass
    with process_span(records[1:3]):
        pass
    del records, polled
    consumer.close()
    consumer = clients.consumer()
    record = next(consumer)
    with process_span(record):
        pass
    del record
    consumer.close()
    let_go(clients.producer(), topic)
    # One of those that were polled has only been received.
    assert sources(recorder) == {"orders": 5}


@pytest.mark.cpython
@pytest.mark.one_broker
@pytest.mark.parametrize(
    ("given", "times"),
    [(lambda records: records, 1), (list, 2)],
    ids=["the list of poll", "a copy"],
)
def test_a_thread_that_gets_the_list_of_poll_measures_each_record_once(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    given: Callable[[list[Any]], list[Any]],
    times: int,
) -> None:
    """The records of another list are measured at their handover, too."""
    instrument(pipeline_latency=True)
    send_with(clients, began(1))
    consumer = clients.consumer()
    closed = threading.Event()

    def process(records: list[Any]) -> None:
        assert closed.wait(DEADLINE)
        for record in records:
            with process_span(record):
                pass

    with ThreadPoolExecutor(1) as pool:
        (working,) = (
            pool.submit(process, given(records)) for records in poll(consumer).values()
        )
        consumer.close()
        closed.set()
        working.result(DEADLINE)
    let_go(clients.producer(), topic)
    assert sources(recorder) == {"orders": times}


def test_what_is_received_is_measured_though_the_record_is_dropped(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    """Records that are made later may have the memory of one that was dropped."""
    instrument(pipeline_latency=True)
    send_with(clients, *(began(1) for _ in range(50)))
    consumer = clients.consumer()
    received = sum(map(len, poll(consumer).values()))
    for record in clients.consumer():
        if record.offset == 49:
            break
    consumer.close()
    let_go(clients.producer(), topic)
    assert sources(recorder) == {"orders": received + 50}


def test_each_attempt_is_measured_also_if_it_fails(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(pipeline_latency=True)
    send_with(clients, began(1))
    for _ in range(2):
        with pytest.raises(ValueError, match="failed"):
            for record in clients.consumer():
                with process_span(record):
                    raise ValueError("failed")
    assert sources(recorder) == {"orders": 2}


def test_a_held_record_is_measured_once(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(pipeline_latency=True, next_process_spans=True)
    send_with(clients, began(1))
    consumer = clients.consumer()
    next(consumer)
    assert recorder.points(LATENCY) == []
    consumer.close()
    assert sources(recorder) == {"orders": 1}
    let_go(clients.producer(), topic)
    assert sources(recorder) == {"orders": 1}


def sources_in_child(recorder: Recorder, work: Callable[[], object]) -> dict[Any, int]:
    """As `sources`, in a forked child that has done some work."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(int(DEADLINE))
        try:
            work()
            os.write(writing, json.dumps(sources(recorder)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as told:
        found = json.load(told)
    os.waitpid(child, 0)
    assert isinstance(found, dict)
    return found


@forks
@needs_fork
@pytest.mark.one_broker
def test_a_forked_child_measures_what_it_consumes_and_its_parent_does_not(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(pipeline_latency=True)
    clients.send(b"value")
    assert sources_in_child(recorder, lambda: loop(clients)) == {topic: 1}
    let_go(clients.producer(), topic)
    assert recorder.points(LATENCY) == []


@forks
@needs_fork
@pytest.mark.one_broker
def test_a_forked_child_leaves_to_its_parent_what_that_has_begun(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(pipeline_latency=True)
    send_with(clients, began(1))
    consumer = clients.consumer()
    poll(consumer)
    for _ in clients.consumer():
        assert sources_in_child(recorder, _endings.abandon_all) == {}
        break
    consumer.close()
    let_go(clients.producer(), topic)
    assert sources(recorder) == {"orders": 2}


@forks
@needs_fork
@pytest.mark.one_broker
def test_limit_what_another_process_processes_is_measured_at_its_handover_too(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(pipeline_latency=True)
    send_with(clients, began(1))
    consumer = clients.consumer(group_id=topic)
    records = poll_records(consumer, 1)

    def process() -> None:
        with process_span(records):
            pass
        (point,) = recorder.points(LATENCY)
        assert "messaging.consumer.group.name" not in point.attributes

    assert sources_in_child(recorder, process) == {"orders": 1}
    consumer.close()
    let_go(clients.producer(), topic)
    (point,) = recorder.points(LATENCY, messaging_consumer_group_name=topic)
    assert point.count == 1


def test_the_capture_of_headers_never_shows_it(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(pipeline_latency=True, capture_headers="*")
    clients.send(b"value")
    loop(clients)
    poll(clients.consumer())
    for span in recorder.ended:
        assert "kafka.pipeline" not in str(span.attributes)
        assert "kafka.pipeline" not in str([link.attributes for link in span.links])


def test_nor_does_it_if_no_propagator_reads_baggage(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(pipeline_latency=True, capture_headers="*")
    send_with(clients, began(1))
    before = propagate.get_global_textmap()
    propagate.set_global_textmap(TraceContextTextMapPropagator())
    try:
        loop(clients)
    finally:
        propagate.set_global_textmap(before)
    (span,) = recorder.named(f"process {topic}")
    assert "kafka.pipeline" not in str(span.attributes)
    assert recorder.points(LATENCY) == []


def test_a_message_that_keeps_its_context_has_the_start_beside_its_own_baggage(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    instrument(pipeline_latency=True)
    own = [("own", b"1"), TRACEPARENT, ("baggage", b"tenant=blue")]
    producer = clients.producer()
    producer.send(topic, b"value", headers=own).get(DEADLINE)
    with suppress_instrumentation():
        (record,) = poll_records(clients.consumer(), 1)
    assert record.headers[:2] == [("own", b"1"), TRACEPARENT]
    assert own == [("own", b"1"), TRACEPARENT, ("baggage", b"tenant=blue")]
    entries = carried(record)
    assert str(entries.pop("kafka.pipeline")).endswith(f"-{topic}")
    assert entries == {"tenant": "blue"}
    # One that has begun goes on.
    kept = [TRACEPARENT, ("baggage", began(9))]
    producer.send(f"{topic}-kept", b"value", headers=kept).get(DEADLINE)
    with suppress_instrumentation():
        (record,) = poll_records(clients.consumer(f"{topic}-kept"), 1)
    assert record.headers == kept


def test_a_service_without_spans_and_without_metrics_starts_pipelines(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    instrument(
        pipeline_latency=True,
        tracer_provider=trace.NoOpTracerProvider(),
        meter_provider=MeterProvider(shutdown_on_exit=False),
        send_spans=False,
    )
    clients.send(b"value")
    (entries,) = received(clients, topic)
    assert entries.keys() == {"kafka.pipeline"}


def test_a_global_provider_that_is_set_late_measures_it_without_other_metrics(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instrument(meter_provider=None, metrics=False, pipeline_latency=True)
    send_with(clients, began(5))
    (record,) = poll_records(clients.consumer(), 1)
    with process_span(record):
        pass
    monkeypatch.setattr(metrics._internal, "_METER_PROVIDER", recorder.meter_provider)
    with process_span(record):
        pass
    assert sources(recorder) == {"orders": 1}


def test_a_consumer_that_cannot_be_read_is_handed_what_it_asked_for(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> bool:
        raise RuntimeError("no configuration")

    monkeypatch.setattr(_kafka, "sends_headers", fail)
    instrument(pipeline_latency=True)
    send_with(clients, began(1))
    (record,) = poll_records(clients.consumer(), 1)
    assert record.headers[0] == TRACEPARENT
    recorder.one(f"poll {clients.topic}")
    (line,) = log.take()
    assert line.startswith("Failed to read the configuration of a client")


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        ((_pipeline.Arrival, "measure"), "record a metric"),
        ((Metrics, "pipeline_latency"), "create the instruments"),
    ],
)
def test_a_histogram_that_fails_is_told_once_and_costs_no_span(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    failing: tuple[Any, str],
    said: str,
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no histogram")

    instrument(pipeline_latency=True)
    monkeypatch.setattr(*failing, fail)
    send_with(clients, began(1))
    loop(clients)
    (line,) = log.take()
    assert said in line
    recorder.one(f"process {clients.topic}")
