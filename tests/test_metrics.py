"""The four metrics: what each operation measures and counts, once."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, cycle
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition
from opentelemetry import metrics
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import Histogram, MeterProvider, ObservableCounter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    InMemoryMetricReader,
)
from opentelemetry.sdk.metrics.view import View
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from clients import DEADLINE, Clients, committable, poll, poll_records
from conftest import Instrument
from otel_kafka_python import KafkaPythonInstrumentor, _metrics, process_span
from recorder import Recorder

OPERATION = "messaging.client.operation.duration"
PROCESS = "messaging.process.duration"
SENT = "messaging.client.sent.messages"
CONSUMED = "messaging.client.consumed.messages"
MESSAGES = 100_000
OURS = "otel_kafka_python"


def test_a_client_names_one_server_whatever_it_does(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    """The first that it was told of, whichever broker it then turns to."""
    clients.create_topic(2)
    host, port = clients.address.split(":")
    named = Clients([f"localhost:{port}", clients.address], topic)
    try:
        producer = named.producer()
        for partition in (None, 0, 1):
            producer.send(topic, b"value", partition=partition).get(DEADLINE)
        producer.flush()
        consumer = named.consumer(group_id=topic)
        for record in poll_records(consumer, 3):
            with process_span(record, consumer=consumer):
                pass
        consumer.commit()
        consumer.commit(committable(topic, 1))
    finally:
        named.close()
    assert f"commit {topic}" in recorder.names()
    for span in recorder.ended:
        assert span.attributes is not None
        assert span.attributes["server.address"] == "localhost"
        assert span.attributes["server.port"] == int(port)
        if span.name == f"send {topic}":
            assert span.attributes["network.peer.address"] == host
    points: list[Any] = [p for m in recorder.metrics() for p in m.data.data_points]
    assert {point.attributes["server.address"] for point in points} == {"localhost"}


def metric(recorder: Recorder, name: str) -> Any:
    (found,) = [metric for metric in recorder.metrics() if metric.name == name]
    return found


@pytest.mark.cpython
def test_a_send_and_a_loop_measure_all_four(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2", b"3")
    consumer = clients.consumer(group_id=f"group-{topic}")
    for record in consumer:
        if record.offset == 2:
            break

    host, port = clients.address.split(":")
    common = {
        "messaging.system": "kafka",
        "messaging.destination.name": topic,
        "messaging.destination.partition.id": "0",
        "server.address": host,
        "server.port": int(port),
    }
    group = {"messaging.consumer.group.name": f"group-{topic}"}
    send = {"messaging.operation.name": "send"}
    receive = {"messaging.operation.name": "poll"}
    process = {"messaging.operation.name": "process"}

    (sent,) = recorder.points(SENT)
    assert (sent.value, dict(sent.attributes)) == (3, {**common, **send})
    (consumed,) = recorder.points(CONSUMED)
    assert (consumed.value, dict(consumed.attributes)) == (
        3,
        {**common, **receive, **group},
    )
    (processed,) = recorder.points(PROCESS)
    assert (processed.count, dict(processed.attributes)) == (
        3,
        {**common, **process, **group},
    )
    (sending,) = recorder.points(OPERATION, messaging_operation_name="send")
    assert (sending.count, dict(sending.attributes)) == (
        3,
        {**common, **send, "messaging.operation.type": "send"},
    )
    # The polls inside the iteration, however many it took.
    (polling,) = recorder.points(OPERATION, messaging_operation_name="poll")
    assert 1 <= polling.count <= 3
    assert dict(polling.attributes) == {
        **common,
        **receive,
        **group,
        "messaging.operation.type": "receive",
    }


@pytest.mark.cpython
def test_names_units_and_boundaries_are_the_conventions(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    clients.send(b"1")
    for _ in clients.consumer():
        break
    boundaries = (
        *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75),
        *(1, 2.5, 5, 7.5, 10),
    )
    for name in (OPERATION, PROCESS):
        found = metric(recorder, name)
        assert found.unit == "s"
        for point in found.data.data_points:
            assert point.explicit_bounds == boundaries
    for name in (SENT, CONSUMED):
        found = metric(recorder, name)
        assert found.unit == "{message}"
        assert found.data.is_monotonic


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        *(("send", OPERATION), ("poll", OPERATION), ("commit", OPERATION)),
        ("process", PROCESS),
    ],
)
@pytest.mark.cpython
def test_a_span_and_its_duration_agree_and_it_is_the_exemplar(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    operation: str,
    name: str,
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    for records in poll(consumer).values():
        for _ in records:
            pass
    consumer.commit()
    span = recorder.one(f"{operation} {topic}")
    assert span.context is not None
    assert span.start_time is not None
    assert span.end_time is not None
    (point,) = recorder.points(name, messaging_operation_name=operation)
    assert point.sum == (span.end_time - span.start_time) / 1e9
    (exemplar,) = point.exemplars
    assert exemplar.trace_id == span.context.trace_id
    assert exemplar.span_id == span.context.span_id


@pytest.mark.cpython
def test_what_is_not_sampled_is_measured_and_no_exemplar(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(tracer_provider=TracerProvider(ALWAYS_OFF, shutdown_on_exit=False))
    clients.send(b"1")
    for _ in clients.consumer():
        break
    for name in (OPERATION, PROCESS, SENT, CONSUMED):
        points = recorder.points(name)
        assert points
        assert [list(point.exemplars) for point in points] == [[]] * len(points)


def test_of_what_has_no_span_the_current_one_is_the_exemplar(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(receive_spans=False)
    clients.send(b"1")
    consumer = clients.consumer()
    with recorder.tracer.start_as_current_span("work") as work:
        poll(consumer)
    (point,) = recorder.points(OPERATION, messaging_operation_name="poll")
    (exemplar,) = point.exemplars
    assert exemplar.span_id == work.get_span_context().span_id


def test_next_is_measured_itself_and_not_its_poll(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    clients.send(b"1", b"2", b"3")
    consumer = clients.consumer()
    for _ in range(3):
        next(consumer)
    assert recorder.count(OPERATION, messaging_operation_name="poll") == 3
    assert recorder.count(CONSUMED, messaging_operation_name="poll") == 3
    assert recorder.count(PROCESS) == 0


def test_poll_counts_all_at_its_return(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    clients.send(b"1", b"2", b"3")
    records = poll_records(clients.consumer(), 3)
    assert recorder.count(CONSUMED) == len(records) == 3
    assert recorder.count(PROCESS) == 0


@pytest.mark.cpython
def test_looping_over_what_poll_returned_counts_nothing_again(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    clients.send(b"1", b"2", b"3")
    for records in poll(clients.consumer()).values():
        for _ in records:
            pass
    assert recorder.count(CONSUMED) == recorder.count(PROCESS) == len(records)


class Counting(KafkaConsumer):  # type: ignore[misc]  # untyped
    """Counts the polls that bring something."""

    fruitful = 0

    def poll(self, *args: Any, **kwargs: Any) -> Any:
        polled = super().poll(*args, **kwargs)
        self.fruitful += bool(polled)
        return polled


@pytest.mark.parametrize("process_spans", [True, False])
def test_an_iteration_is_measured_by_its_polls_and_not_by_its_records(
    instrument: Instrument, clients: Clients, recorder: Recorder, process_spans: bool
) -> None:
    instrument(process_spans=process_spans)
    clients.send(b"1", b"2", b"3")
    consumer = clients.consumer(cls=Counting)
    for record in consumer:
        # What is fetched ahead counts when it is handed over.
        assert recorder.count(CONSUMED) == record.offset + 1
        if record.offset == 2:
            break
    polls = recorder.count(OPERATION, messaging_operation_name="poll")
    assert polls == consumer.fruitful < 3


@pytest.mark.cpython
def test_durations_are_recorded_where_no_span_is_made(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(send_spans=False, receive_spans=False, process_spans=False)
    clients.send(b"1", b"2")
    consumer = clients.consumer()
    for record in consumer:
        if record.offset == 1:
            break
    assert recorder.started == []
    assert recorder.count(OPERATION, messaging_operation_name="send") == 2
    assert recorder.count(OPERATION, messaging_operation_name="poll") >= 1
    assert recorder.count(SENT) == recorder.count(CONSUMED) == 2
    assert recorder.count(PROCESS) == 2


def test_a_provider_of_the_api_itself_costs_nothing(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(meter_provider=NoOpMeterProvider())
    clients.send(b"1")
    assert recorder.names() == [f"send {topic}"]


def test_a_global_provider_that_is_set_late_is_noticed(
    instrument: Instrument, clients: Clients, recorder: Recorder, monkeypatch: Any
) -> None:
    instrument(meter_provider=None)
    producer = clients.producer(metadata_max_age_ms=100)
    producer.send(clients.topic, b"1").get(30)
    monkeypatch.setattr(metrics._internal, "_METER_PROVIDER", recorder.meter_provider)
    sent = 1
    deadline = time.monotonic() + DEADLINE
    while not recorder.count(SENT):
        assert time.monotonic() < deadline
        producer.send(clients.topic, b"2").get(30)
        sent += 1
    before = recorder.count(SENT)
    producer.send(clients.topic, b"3").get(30)
    producer.flush()
    assert recorder.count(SENT) == before + 1


def test_a_global_provider_that_is_set_late_is_noticed_without_a_consumer(
    instrument: Instrument, clients: Clients, recorder: Recorder, monkeypatch: Any
) -> None:
    instrument(meter_provider=None)
    clients.send(b"1")
    (record,) = poll_records(clients.consumer(), 1)
    with process_span(record):
        pass
    monkeypatch.setattr(metrics._internal, "_METER_PROVIDER", recorder.meter_provider)
    with process_span(record):
        pass
    assert recorder.count(PROCESS) == 1


def test_counts_go_on_through_another_instrumentation(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    producer = clients.producer()
    for _ in range(3):
        instrument()
        producer.send(clients.topic, b"value").get(DEADLINE)
        producer.flush()
        KafkaPythonInstrumentor().uninstrument()
    producer.send(clients.topic, b"value").get(DEADLINE)
    assert recorder.count(SENT) == 3
    assert recorder.count(OPERATION, messaging_operation_name="send") == 3


def test_two_readers_see_the_same_each_in_its_temporality(
    instrument: Instrument, clients: Clients
) -> None:
    of_change = AggregationTemporality.DELTA
    delta = InMemoryMetricReader(
        preferred_temporality={ObservableCounter: of_change, Histogram: of_change}
    )
    cumulative = InMemoryMetricReader()
    provider = MeterProvider([delta, cumulative], shutdown_on_exit=False)
    instrument(meter_provider=provider)

    def counts(reader: InMemoryMetricReader) -> dict[str, int]:
        data = reader.get_metrics_data()
        assert data is not None
        found = {}
        for each in data.resource_metrics[0].scope_metrics[0].metrics:
            point: Any
            (point,) = each.data.data_points
            found[each.name] = point.value if each.name == SENT else point.count
        return found

    clients.send(b"1", b"2")
    for reader in (delta, cumulative):
        assert counts(reader) == {SENT: 2, OPERATION: 2}
    clients.send(b"3")
    assert counts(delta) == {SENT: 1, OPERATION: 1}
    assert counts(cumulative) == {SENT: 3, OPERATION: 3}
    provider.shutdown()


def test_a_view_without_the_partition_adds_up(
    instrument: Instrument, clients: Clients, topic: str
) -> None:
    clients.create_topic(2)
    reader = InMemoryMetricReader()
    view = View(instrument_name=SENT, attribute_keys={"messaging.destination.name"})
    provider = MeterProvider([reader], shutdown_on_exit=False, views=[view])
    instrument(meter_provider=provider)
    producer = clients.producer()
    # It is read again and again, and tells all that there have been each time.
    for number in range(1, 4):
        for partition in range(2):
            producer.send(topic, b"value", partition=partition)
        producer.flush()
        data = reader.get_metrics_data()
        assert data is not None
        (found,) = [
            metric
            for metric in data.resource_metrics[0].scope_metrics[0].metrics
            if metric.name == SENT
        ]
        point: Any
        (point,) = found.data.data_points
        assert point.value == 2 * number
        assert point.attributes == {"messaging.destination.name": topic}
    provider.shutdown()


def test_what_is_kept_is_bounded_by_the_distinct_attributes(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    # Whatever comes and goes: clients, messages, keys.
    for number in range(5):
        producer = clients.producer(client_id=f"client-{number}")
        for _ in range(20):
            producer.send(topic, b"value", key=b"%d" % number)
        producer.close()
    assert len(recorder.points(SENT)) == 1
    assert len(recorder.points(OPERATION)) == 1
    assert recorder.count(SENT) == 100


class _Topic(str):
    """As applications have that give their topics a type."""

    __slots__ = ()


def test_a_subclass_of_str_is_the_same_attribute(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer()
    for each in (topic, _Topic(topic)):
        producer.send(each, b"value").get(DEADLINE)
    consumer = clients.consumer(
        _Topic(topic), group_id=_Topic(topic), client_id=_Topic("shipping")
    )
    poll_records(consumer, 2)
    consumer.commit(committable(_Topic(topic), 2))
    producer.flush()
    # That all of them are plain the recorder sees.
    (point,) = recorder.points(SENT)
    assert point.value == 2


THREADS = 16


@pytest.mark.one_broker
@pytest.mark.two_clients
def test_many_threads_lose_no_count(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    # So many spans would take long; the counts do not depend on them.
    instrument(tracer_provider=TracerProvider(ALWAYS_OFF, shutdown_on_exit=False))
    clients.create_topic(THREADS)
    producers = [clients.producer(linger_ms=5) for _ in range(2)]
    each = MESSAGES // THREADS

    def produce(thread: int) -> None:
        for _ in range(each):
            producers[thread % 2].send(topic, b"value", partition=thread)

    def consume(thread: int) -> int:
        consumer = clients.consumer()
        consumer.unsubscribe()
        consumer.assign([TopicPartition(topic, thread)])
        count = 0
        if thread % 2:
            for _ in consumer:
                count += 1
                if count == each:
                    return count
        while count < each:
            count += sum(map(len, poll(consumer).values()))
        return count

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(produce, range(THREADS)))
        for producer in producers:
            producer.flush()
        ends = clients.consumer().end_offsets(
            [TopicPartition(topic, thread) for thread in range(THREADS)]
        )
        consumed = list(pool.map(consume, range(THREADS)))
    assert sum(ends.values()) == sum(consumed) == MESSAGES
    for partition, end in ends.items():
        of_partition = {"messaging_destination_partition_id": str(partition.partition)}
        assert recorder.count(SENT, **of_partition) == end
        assert recorder.count(CONSUMED, **of_partition) == end


def test_threads_that_make_the_instruments_at_once_have_the_same(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK reads the first observable counter of a name and no other."""
    found: list[Any] = []
    lock, waits = _metrics._making, threading.Event()

    class Telling:
        def __enter__(self) -> None:
            if threading.current_thread() in others:
                waits.set()
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    class Slow(MeterProvider):
        def get_meter(self, *args: Any, **kwargs: Any) -> Any:
            if not others:
                others.append(threading.Thread(target=make))
                others[0].start()
                assert waits.wait(DEADLINE)
            return super().get_meter(*args, **kwargs)

    def make() -> None:
        found.append(made.instruments())

    monkeypatch.setattr(_metrics, "_making", Telling())
    others: list[threading.Thread] = []
    made = _metrics.Metrics(Slow([recorder.reader.__class__()], shutdown_on_exit=False))
    make()
    others[0].join(DEADLINE)
    one, other = found
    assert one is other


@pytest.mark.cpython
def test_durations_do_not_follow_a_clock_that_is_set(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = clients.consumer()
    producer = clients.producer()
    hour = 3_600 * 10**9
    # Each time that it is read, it has been set: forward, and then back.
    hours = chain([1, 9], cycle([5, 3]))
    monkeypatch.setattr(time, "time_ns", lambda: next(hours) * hour)
    producer.send(clients.topic, b"1").get(DEADLINE)
    producer.flush()
    for _ in consumer:
        break
    consumer.poll(timeout_ms=0)
    monkeypatch.undo()
    assert recorder.open() == []
    for span in recorder.ended:
        assert span.start_time is not None
        assert span.end_time is not None
        assert 0 <= span.end_time - span.start_time < DEADLINE * 10**9
    points = [*recorder.points(OPERATION), *recorder.points(PROCESS)]
    assert {point.attributes["messaging.operation.name"] for point in points} == {
        *("poll", "process", "send"),
    }
    assert all(0 < point.min <= point.max < DEADLINE for point in points)


@pytest.mark.parametrize("frozen_at", ["start", "end"])
def test_a_duration_is_the_same_whenever_a_test_freezes_the_time(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    frozen_at: str,
) -> None:
    producer = clients.producer(linger_ms=int(DEADLINE * 1000))
    producer.partitions_for(topic)
    with pytest.MonkeyPatch.context() as patch:
        if frozen_at == "start":
            freeze(patch)
        producer.send(topic, b"1")
    with pytest.MonkeyPatch.context() as patch:
        if frozen_at == "end":
            freeze(patch)
        producer.flush()
    span = recorder.one(f"send {topic}")
    assert span.start_time is not None
    assert span.end_time is not None
    assert 0 <= span.end_time - span.start_time < DEADLINE * 10**9
    (point,) = recorder.points(OPERATION, messaging_operation_name="send")
    assert 0 < point.min <= point.max < DEADLINE


def freeze(patch: pytest.MonkeyPatch) -> None:
    """Freeze our time as freezegun does: in `time`, and in all that was imported."""
    for name in ("time_ns", "monotonic_ns"):
        plain = getattr(time, name)
        patch.setattr(time, name, lambda: 10**18)
        for module in [m for n, m in sys.modules.items() if n.startswith(OURS)]:
            for own, value in list(vars(module).items()):
                if value is plain:
                    patch.setattr(module, own, getattr(time, name))
