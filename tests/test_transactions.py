"""Transactions: their own spans, and an exactly-once service that crashes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import kafka.errors
import pytest
from kafka import KafkaProducer
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.trace import SpanKind, StatusCode

from clients import DEADLINE, Clients, committable, poll_records
from conftest import Instrument
from deliveries import until_all_have_ended
from otel_kafka_python import KafkaPythonInstrumentor, _endings
from recorder import Log, Recorder, attributes_of
from scripts import run

pytestmark = pytest.mark.skipif(
    not hasattr(KafkaProducer, "begin_transaction"),
    reason="transactions are new in kafka-python 2.2",
)


@pytest.fixture
def producer(clients: Clients, topic: str) -> Any:
    producer = clients.producer(transactional_id=topic, client_id="shop")
    producer.init_transactions()
    return producer


def test_a_committed_transaction(
    instrumented: None, clients: Clients, producer: Any, recorder: Recorder, topic: str
) -> None:
    with recorder.tracer.start_as_current_span("work"):
        producer.begin_transaction()
        producer.send(topic, b"value")
        producer.send_offsets_to_transaction(committable(topic, 3), "group")
        producer.commit_transaction()
    host, port = clients.address.split(":")
    work = recorder.one("work")
    expected = {
        "messaging.system": "kafka",
        "messaging.client.id": "shop",
        "server.address": host,
        "server.port": int(port),
    }
    settled = {
        "messaging.operation.type": "settle",
        "messaging.destination.name": topic,
        "messaging.destination.partition.id": "0",
        "messaging.consumer.group.name": "group",
    }
    for name, destination, more in (
        ("send_offsets_to_transaction", f" {topic}", settled),
        ("commit_transaction", "", {}),
    ):
        span = recorder.one(f"{name}{destination}")
        assert span.kind is SpanKind.CLIENT
        assert span.parent == work.context
        assert span.status.status_code is StatusCode.UNSET
        (attributes,) = attributes_of([span])
        attributes.pop("messaging.kafka.cluster.id", None)
        assert attributes == {
            **expected,
            **more,
            "messaging.operation.name": name,
        }
    assert recorder.one(f"send {topic}").parent == work.context
    assert recorder.count("messaging.client.operation.duration") == 2
    (point,) = recorder.points(
        "messaging.client.operation.duration",
        messaging_operation_name="send_offsets_to_transaction",
    )
    host, port = clients.address.split(":")
    assert dict(point.attributes) == {
        "messaging.system": "kafka",
        "messaging.operation.name": "send_offsets_to_transaction",
        "server.address": host,
        "server.port": int(port),
        **settled,
    }
    consumer = clients.consumer(isolation_level="read_committed")
    assert [record.value for record in poll_records(consumer, 1)] == [b"value"]


def test_an_aborted_transaction(
    instrumented: None, producer: Any, recorder: Recorder, topic: str
) -> None:
    producer.begin_transaction()
    future = producer.send(topic, b"value")
    producer.abort_transaction()
    span = recorder.one("abort_transaction")
    assert span.status.status_code is StatusCode.UNSET
    sent = recorder.one(f"send {topic}")
    assert future.is_done
    assert future.failed() == (sent.status.status_code is StatusCode.ERROR)
    assert recorder.open() == []


def test_messages_of_an_aborted_transaction_that_were_not_sent_are_no_attempt(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    producer = clients.producer(transactional_id=topic, linger_ms=int(DEADLINE * 1000))
    producer.init_transactions()
    producer.partitions_for(topic)
    producer.begin_transaction()
    future = producer.send(topic, b"value")
    producer.abort_transaction()
    until_all_have_ended(recorder)
    assert future.failed()
    (attributes,) = attributes_of([recorder.one(f"send {topic}")])
    assert "network.peer.address" not in attributes
    assert recorder.count("messaging.client.sent.messages") == 0


def test_messages_of_a_producer_that_its_coordinator_has_fenced_are_no_attempt(
    instrumented: None, clients: Clients, producer: Any, recorder: Recorder, topic: str
) -> None:
    producer.partitions_for(topic)
    other = clients.producer(transactional_id=topic)
    other.init_transactions()
    producer.begin_transaction()
    future = producer.send(topic, b"value")
    with pytest.raises(kafka.errors.KafkaError):
        future.get(DEADLINE)
    until_all_have_ended(recorder)
    (attributes,) = attributes_of([recorder.one(f"send {topic}")])
    assert "error.type" in attributes
    assert "network.peer.address" not in attributes
    assert recorder.count("messaging.client.sent.messages") == 0


@pytest.mark.parametrize("commits", [True, False], ids=["commit", "abort"])
def test_a_fenced_producer_ends_every_span_with_the_error(
    instrumented: None,
    clients: Clients,
    producer: Any,
    recorder: Recorder,
    topic: str,
    commits: bool,
) -> None:
    producer.begin_transaction()
    producer.send(topic, b"first").get(DEADLINE)
    other = clients.producer(transactional_id=topic)
    other.init_transactions()
    failed = producer.send(topic, b"second")
    with pytest.raises(kafka.errors.KafkaError) as of_send:
        failed.get(DEADLINE)
    with pytest.raises(kafka.errors.KafkaError) as of_end:
        if commits:
            producer.commit_transaction()
        else:
            producer.abort_transaction()
            pytest.fail("a fenced producer cannot abort")
    first, second = recorder.named(f"send {topic}")
    ending = recorder.one("commit_transaction" if commits else "abort_transaction")
    assert first.status.status_code is StatusCode.UNSET
    for span, raised in ((second, of_send), (ending, of_end)):
        assert span.status.status_code is StatusCode.ERROR
        (attributes,) = attributes_of([span])
        error = raised.value
        assert attributes["error.type"] in {
            type(error).__name__,
            getattr(error, "message", None),
        }
        assert [event.name for event in span.events] == ["exception"]
    assert recorder.open() == []


def test_a_transaction_of_a_plain_producer_is_refused_as_ever(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    producer = clients.producer()
    refused: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (producer.commit_transaction, ()),
        (producer.abort_transaction, ()),
        (producer.send_offsets_to_transaction, ({}, "group")),
    ]
    for method, arguments in refused:
        with pytest.raises(kafka.errors.IllegalStateError):
            method(*arguments)
        with pytest.raises(TypeError):
            method(*arguments, "too", "many", "arguments")
    assert {span.status.status_code for span in recorder.ended} == {StatusCode.ERROR}
    assert recorder.open() == []


def test_without_commit_spans_there_are_none_of_transactions(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(commit_spans="none")
    producer = clients.producer(transactional_id=topic)
    producer.init_transactions()
    producer.begin_transaction()
    producer.send(topic, b"value")
    producer.send_offsets_to_transaction(committable(topic, 3), "group")
    producer.commit_transaction()
    assert recorder.names() == [f"send {topic}"]
    assert recorder.count(
        "messaging.client.operation.duration", messaging_operation_type="settle"
    ) == 1  # fmt: skip


def test_offsets_of_several_topics_have_no_destination(
    instrumented: None, producer: Any, recorder: Recorder, topic: str
) -> None:
    offsets = committable(topic, 1) | committable(f"{topic}-other", 1)
    producer.begin_transaction()
    for partition in offsets:  # a topic that is not there would be waited for
        producer.send(partition.topic, b"value")
    producer.send_offsets_to_transaction(offsets, "group")
    producer.commit_transaction()
    (attributes,) = attributes_of([recorder.one("send_offsets_to_transaction")])
    assert "messaging.destination.name" not in attributes


def test_a_transaction_in_flight_at_the_exit_has_an_unknown_outcome(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered, released = threading.Event(), threading.Event()

    def commit(_: Any) -> None:
        entered.set()
        released.wait(DEADLINE)

    monkeypatch.setattr(KafkaProducer, "commit_transaction", commit)
    instrument()
    thread = threading.Thread(target=clients.producer().commit_transaction)
    thread.start()
    assert entered.wait(DEADLINE)
    _endings.abandon_all()
    released.set()
    thread.join()
    span = recorder.one("commit_transaction")
    assert span.status.status_code is StatusCode.ERROR
    assert attributes_of([span])[0]["error.type"] == "outcome_unknown"
    KafkaPythonInstrumentor().uninstrument()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_a_transaction_that_is_interrupted_has_an_error_and_no_exception(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    interrupt: type[BaseException],
) -> None:
    def commit(_: Any) -> None:
        raise interrupt

    monkeypatch.setattr(KafkaProducer, "commit_transaction", commit)
    instrument()
    with pytest.raises(interrupt):
        clients.producer().commit_transaction()
    span = recorder.one("commit_transaction")
    assert attributes_of([span])[0]["error.type"] == interrupt.__name__
    assert span.events == ()
    KafkaPythonInstrumentor().uninstrument()


def test_offsets_of_excluded_topics_alone_make_no_span(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(excluded_topics=[topic])
    clients.send(b"value")
    producer = clients.producer(transactional_id=topic)
    producer.init_transactions()
    producer.begin_transaction()
    producer.send_offsets_to_transaction(committable(topic, 1), "group")
    producer.commit_transaction()
    assert recorder.names() == ["commit_transaction"]


Fake = Callable[[str, Any], list[Any]]


@pytest.fixture
def fake(instrument: Instrument, clients: Clients) -> Iterator[Fake]:
    """Replaces a method of producers by one that returns or raises a result.

    The list that it gives gets the arguments of each call.
    """
    with pytest.MonkeyPatch.context() as patch:

        def replace(name: str, result: Any) -> list[Any]:
            calls: list[Any] = []

            def method(_: Any, *args: Any, **kwargs: Any) -> Any:
                calls.append((args, kwargs))
                if isinstance(result, BaseException):
                    raise result
                return result

            patch.setattr(KafkaProducer, name, method)
            return calls

        yield replace
        KafkaPythonInstrumentor().uninstrument()


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "suppressed"])
def test_what_a_transaction_is_given_and_returns_stays_as_it_is(
    instrument: Instrument,
    fake: Fake,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    traced: bool,
) -> None:
    result, offsets = object(), committable(topic, 1)
    calls = fake("send_offsets_to_transaction", result)
    instrument()
    producer = clients.producer()
    with nullcontext() if traced else suppress_instrumentation():
        sent = producer.send_offsets_to_transaction(offsets, group_metadata="group")
    assert sent is result
    assert calls == [((offsets,), {"group_metadata": "group"})]
    assert recorder.names() == [f"send_offsets_to_transaction {topic}"] * traced


def test_a_suppressed_transaction_that_fails_raises_its_own_error(
    instrument: Instrument, fake: Fake, clients: Clients, recorder: Recorder, topic: str
) -> None:
    error = ValueError("no")
    fake("send_offsets_to_transaction", error)
    instrument()
    producer = clients.producer()
    with suppress_instrumentation(), pytest.raises(ValueError, match="no") as raised:
        producer.send_offsets_to_transaction(committable(topic, 1), "group")
    assert raised.value is error
    assert recorder.started == []


def test_offsets_beside_those_of_excluded_topics_are_as_if_alone(
    instrument: Instrument, fake: Fake, clients: Clients, recorder: Recorder, topic: str
) -> None:
    fake("send_offsets_to_transaction", None)
    instrument(excluded_topics=["excluded"])
    offsets = committable(topic, 1) | committable("excluded", 1)
    clients.producer().send_offsets_to_transaction(offsets, "group")
    (attributes,) = attributes_of(recorder.ended)
    assert attributes["messaging.destination.name"] == topic


def test_a_transaction_of_no_offsets_has_a_span(
    instrument: Instrument, fake: Fake, clients: Clients, recorder: Recorder
) -> None:
    fake("send_offsets_to_transaction", None)
    instrument()
    clients.producer().send_offsets_to_transaction({}, "group")
    assert recorder.names() == ["send_offsets_to_transaction"]


class Unreadable(dict[Any, Any]):
    """Offsets that cannot be read."""

    def items(self) -> Any:
        raise RuntimeError("no offsets today")


def test_offsets_that_cannot_be_read_are_sent_and_not_traced(
    instrument: Instrument, fake: Fake, clients: Clients, recorder: Recorder, log: Log
) -> None:
    offsets, result = Unreadable(), object()
    calls = fake("send_offsets_to_transaction", result)
    instrument()
    sent = clients.producer().send_offsets_to_transaction(offsets, "group")
    assert sent is result
    assert calls == [((offsets, "group"), {})]
    assert recorder.started == []
    (message,) = log.take()
    assert message.startswith("Failed to trace a transaction")


# A service that moves each record to another topic exactly once. Told to crash, it
# dies between the send and the commit of its second transaction.
SERVICE = """
    import json, os, sys
    address, source, target, crashes = sys.argv[1:]
    from recorder import Recorder
    from clients import committable
    recorder = Recorder()
    from otel_kafka_python import KafkaPythonInstrumentor
    KafkaPythonInstrumentor().instrument(
        tracer_provider=recorder.tracer_provider,
        meter_provider=recorder.meter_provider,
    )
    from kafka import KafkaConsumer, KafkaProducer

    def tell():
        recorder.check()
        by_id = {span.context.span_id: span.name for span in recorder.ended}
        print(json.dumps([
            {
                "name": span.name,
                "trace": span.context.trace_id,
                "id": span.context.span_id,
                "parent": span.parent and span.parent.span_id,
                "offset": span.attributes.get("messaging.kafka.offset"),
                "error": span.attributes.get("error.type"),
            }
            for span in sorted(recorder.ended, key=lambda span: span.start_time)
        ]), flush=True)

    producer = KafkaProducer(
        bootstrap_servers=address, transactional_id=source,
        transaction_timeout_ms=20000,
    )
    producer.init_transactions()
    consumer = KafkaConsumer(
        source, bootstrap_servers=address, group_id=source,
        auto_offset_reset="earliest", enable_auto_commit=False,
        isolation_level="read_committed", session_timeout_ms=6000,
    )
    for record in consumer:
        producer.begin_transaction()
        producer.send(target, record.value).get(30)
        if crashes == "crashes" and record.offset == 1:
            recorder.tracer_provider.shutdown()
            tell()
            os._exit(9)
        producer.send_offsets_to_transaction(
            committable(source, record.offset + 1), source
        )
        producer.commit_transaction()
        if record.offset == 2:
            break
    consumer.close()
    producer.close()
    tell()
"""


def test_an_exactly_once_service_that_crashes_tells_its_story(
    gives_away: None,
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    target = f"{topic}-out"
    clients.send(b"0", b"1", b"2")
    created = [span.context for span in recorder.named(f"send {topic}")]

    def serve(how: str, expected: int) -> list[dict[str, Any]]:
        done = run(SERVICE, clients.address, topic, target, how)
        assert done.returncode == expected, done.stderr
        told: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return told

    crashed = serve("crashes", 9)
    restarted = serve("completes", 0)

    def of_trace(spans: list[dict[str, Any]], offset: int) -> list[str]:
        context = created[offset]
        assert context is not None
        return [
            span["name"].replace(topic, "t")
            for span in spans
            if span["trace"] == context.trace_id
        ]

    whole = [
        *("process t", "send t-out"),
        *("send_offsets_to_transaction t", "commit_transaction"),
    ]
    assert of_trace(crashed, 0) == whole
    # It was sent and never committed: the span of the body had no end to tell of.
    assert of_trace(crashed, 1) == ["send t-out"]
    # The same record again, in the same trace, after it.
    assert of_trace(restarted, 0) == []
    assert of_trace(restarted, 1) == whole
    assert of_trace(restarted, 2) == whole
    assert {span["error"] for span in crashed + restarted} == {None}
    process = [s for s in restarted if s["name"] == f"process {topic}"]
    assert [span["offset"] for span in process] == [1, 2]
    for span in restarted:
        if not span["name"].startswith("process"):
            assert span["parent"] in {each["id"] for each in process}
    consumer = clients.consumer(target, isolation_level="read_committed")
    values = [record.value for record in poll_records(consumer, 3)]
    assert values == [b"0", b"1", b"2"]
