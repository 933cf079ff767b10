"""Commits: one span for each, whatever way it took."""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import kafka.errors
import pytest
from kafka import KafkaConsumer, TopicPartition
from kafka.coordinator.consumer import ConsumerCoordinator
from kafka.future import Future
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.trace import SpanKind, StatusCode

from clients import DEADLINE, VERSION, Clients, committable, poll, poll_records
from conftest import Instrument
from otel_kafka_python import KafkaPythonInstrumentor, _endings, _kafka
from otel_kafka_python._commits import CommitLedger, PendingCommit
from recorder import Log, Recorder, attributes_of


def until(happened: Callable[[], bool], work: Callable[[], Any]) -> None:
    """Work until something has happened."""
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline
        work()


def poll_until(consumer: Any, happened: Callable[[], bool]) -> None:
    """Let the client work until something has happened."""
    # A shorter one would leave kafka-python no time to join or to commit.
    until(happened, lambda: consumer.poll(timeout_ms=500))


def commits(recorder: Recorder) -> list[str]:
    return [name for name in recorder.names() if name.startswith("commit")]


def measured(recorder: Recorder) -> int:
    """How many commits the duration was measured of."""
    return recorder.count(
        "messaging.client.operation.duration", messaging_operation_name="commit"
    )


@pytest.mark.cpython
def test_a_commit_in_a_loop_is_a_child_of_the_process_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2", b"3")
    consumer = clients.consumer(group_id=topic, client_id="shipping")
    for record in consumer:
        if record.offset == 1:
            consumer.commit()
            break
    span = recorder.one(f"commit {topic}")
    process = recorder.named(f"process {topic}")[1]
    assert span.kind is SpanKind.CLIENT
    assert span.parent == process.context
    host, port = clients.address.split(":")
    (attributes,) = attributes_of([span])
    attributes.pop("messaging.kafka.cluster.id", None)  # 2.1 and later
    assert attributes == {
        "messaging.system": "kafka",
        "messaging.operation.name": "commit",
        "messaging.operation.type": "settle",
        "messaging.destination.name": topic,
        "messaging.destination.partition.id": "0",
        "messaging.consumer.group.name": topic,
        "messaging.client.id": "shipping",
        # The last record that it covers; what Kafka calls the offset is 2.
        "messaging.kafka.offset": 1,
        "server.address": host,
        "server.port": int(port),
        "network.peer.address": host,
        "network.peer.port": int(port),
    }
    assert (
        recorder.count(
            "messaging.client.operation.duration",
            messaging_operation_name="commit",
            messaging_operation_type="settle",
            messaging_destination_name=topic,
        )
        == 1
    )
    assert consumer.committed(TopicPartition(topic, 0)) == 2


def test_a_commit_over_partitions_has_its_topic_and_no_offset(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.create_topic(2)
    producer = clients.producer()
    for partition in range(2):
        producer.send(topic, b"value", partition=partition)
    producer.flush()
    consumer = clients.consumer(group_id=topic)
    poll_records(consumer, 2)
    consumer.commit()
    (attributes,) = attributes_of([recorder.one(f"commit {topic}")])
    assert attributes["messaging.destination.name"] == topic
    assert "messaging.destination.partition.id" not in attributes
    assert "messaging.kafka.offset" not in attributes
    assert "messaging.batch.message_count" not in attributes


def test_a_commit_over_topics_has_no_topic_in_its_name(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    topics = [topic, f"{topic}-other"]
    producer = clients.producer()
    for each in topics:
        producer.send(each, b"value").get(DEADLINE)
    consumer = clients.consumer(*topics, group_id=topic)
    poll_records(consumer, 2)
    consumer.commit()
    (attributes,) = attributes_of([recorder.one("commit")])
    assert "messaging.destination.name" not in attributes


def test_a_commit_of_nothing_consumed_covers_no_record(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    poll(consumer)
    consumer.commit(committable(topic, 0))
    (attributes,) = attributes_of([recorder.one(f"commit {topic}")])
    assert "messaging.kafka.offset" not in attributes


def test_commit_async_ends_with_the_answer(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2")
    consumer = clients.consumer(group_id=topic)
    poll_records(consumer, 2)
    called: list[Any] = []
    with recorder.tracer.start_as_current_span("work"):
        future = consumer.commit_async(callback=lambda *given: called.append(given))
    ended: list[list[str]] = []
    future.add_both(lambda _: ended.append(commits(recorder)))
    poll_until(consumer, lambda: bool(called))
    assert future.succeeded()
    ((offsets, answer),) = called
    assert [each.offset for each in offsets.values()] == [2]
    assert not isinstance(answer, Exception)
    span, work = recorder.one(f"commit {topic}"), recorder.one("work")
    assert span.parent == work.context
    (attributes,) = attributes_of([span])
    assert attributes["messaging.kafka.offset"] == 1
    assert "network.peer.address" in attributes
    assert ended == [[span.name]]


def test_commit_async_before_the_coordinator_is_known_is_the_callers(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    consumer.unsubscribe()
    consumer.partitions_for_topic(topic)  # so that there is a broker to ask
    consumer.assign([TopicPartition(topic, 0)])
    assert consumer._coordinator.coordinator_unknown()
    answers: list[Any] = []

    def commit() -> None:
        with recorder.tracer.start_as_current_span("work"):
            consumer.commit_async(
                committable(topic, 1), lambda offsets, answer: answers.append(answer)
            )
        count = len(recorder.named("work"))
        poll_until(consumer, lambda: len(answers) == count)

    # Up to 2.3 the first fails: the coordinator is known then, but not connected.
    until(lambda: bool(answers) and not isinstance(answers[-1], Exception), commit)
    spans, works = recorder.named(f"commit {topic}"), recorder.named("work")
    for span, work, answer in zip(spans, works, answers, strict=True):
        assert span.parent == work.context
        failed = _kafka.error_type(answer) if isinstance(answer, Exception) else None
        assert (span.attributes or {}).get("error.type") == failed
    assert consumer.committed(TopicPartition(topic, 0)) == 1


@pytest.mark.parametrize("way", ["commit", "commit_async"])
def test_a_commit_that_fails_has_its_error(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, way: str
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    poll(consumer)
    consumer._coordinator.reset_generation()  # as when it was put out of its group
    if way == "commit":
        with pytest.raises(kafka.errors.CommitFailedError):
            consumer.commit(committable(topic, 1))
    else:
        future = consumer.commit_async(committable(topic, 1))
        # A poll would join the group again, before the answer perhaps.
        until(lambda: future.is_done, consumer.topics)
        assert isinstance(future.exception, kafka.errors.CommitFailedError)
    span = recorder.one(f"commit {topic}")
    assert span.status.status_code is StatusCode.ERROR
    (attributes,) = attributes_of([span])
    assert attributes["error.type"] == "CommitFailedError"
    (event,) = span.events
    assert event.name == "exception"
    assert "network.peer.address" not in attributes
    assert (
        recorder.count(
            "messaging.client.operation.duration",
            messaging_operation_name="commit",
            error_type="CommitFailedError",
        )
        == 1
    )


def test_a_commit_that_is_not_made_has_no_peer_whatever_the_error(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    """Another commit's callback raises in it, and the broker is not asked."""
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    poll(consumer)
    error = kafka.errors.GroupAuthorizationFailedError(topic)
    consumer.commit_async(committable(topic, 1), Mock(side_effect=error))
    until(lambda: bool(consumer._coordinator.completed_offset_commits), consumer.topics)
    with pytest.raises(kafka.errors.GroupAuthorizationFailedError):
        consumer.commit_async(committable(topic, 0))
    made, failed = attributes_of(recorder.named(f"commit {topic}"))
    assert "network.peer.address" in made
    assert "network.peer.address" not in failed
    assert failed["error.type"] == "GROUP_AUTHORIZATION_FAILED"


def test_what_kafka_python_refuses_to_commit_is_refused_and_makes_nothing(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    grouped, alone = clients.consumer(group_id=topic), clients.consumer()
    poll(grouped)

    def attempts() -> list[type]:
        raised: list[type] = []
        for consumer, offsets in (
            (alone, None),
            (alone, committable(topic, 1)),
            (grouped, {TopicPartition(topic, 0): 1}),
            (grouped, {"nothing": 1}),
            (grouped, [1]),
        ):
            for method in (consumer.commit, consumer.commit_async):
                with pytest.raises(Exception) as caught:
                    method(offsets)
                raised.append(caught.type)
        return raised

    plain = attempts()
    instrument()
    assert attempts() == plain
    assert recorder.started == []


def test_nothing_to_commit_makes_nothing(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    consumer = clients.consumer(group_id=topic)
    consumer.commit()
    consumer.commit({})
    assert recorder.started == []


def test_suppressed_a_commit_makes_nothing(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    poll(consumer)
    with suppress_instrumentation():
        consumer.commit()
        done = consumer.commit_async()
    poll_until(consumer, lambda: bool(done.is_done))
    assert commits(recorder) == []


def test_commits_without_spans_are_measured(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(commit_spans="none")
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    poll(consumer)
    consumer.commit()
    assert commits(recorder) == []
    assert measured(recorder) == 1


def test_excluded_topics_are_as_if_they_were_not_committed(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    other = f"{topic}-other"
    instrument(excluded_topics=[other])
    producer = clients.producer()
    for each in (topic, other):
        producer.send(each, b"value").get(DEADLINE)
    consumer = clients.consumer(topic, other, group_id=topic)
    poll_records(consumer, 2)
    consumer.commit(committable(other, 1))
    assert commits(recorder) == []
    consumer.commit()
    (attributes,) = attributes_of([recorder.one(f"commit {topic}")])
    assert attributes["messaging.kafka.offset"] == 0


@pytest.mark.parametrize("way", ["loop", "poll"])
def test_auto_commits_are_measured_and_make_no_span_unless_asked_for(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, way: str
) -> None:
    clients.send(b"1", b"2")
    consumer = clients.finite(
        2, group_id=topic, enable_auto_commit=True, auto_commit_interval_ms=1
    )
    if way == "loop":
        for _ in consumer:
            pass
    else:
        poll_records(consumer, 2)
    consumer.close()
    assert commits(recorder) == []
    assert measured(recorder) >= 1


def auto_committing(clients: Clients, **config: Any) -> Any:
    return clients.consumer(
        group_id=clients.topic,
        enable_auto_commit=True,
        **{"auto_commit_interval_ms": 1, **config},
    )


def test_an_auto_commit_makes_a_span_where_it_moves_an_offset(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(commit_spans="all")

    def moved() -> list[Any]:
        # One that fails has moved nothing. The first may, of a coordinator that is
        # only being connected to; the next one tries the same again.
        return [
            (span.attributes or {}).get("messaging.kafka.offset")
            for span in recorder.named(f"commit {topic}")
            if span.status.status_code is StatusCode.UNSET
        ]

    clients.send(b"1", b"2")
    consumer = auto_committing(clients)
    poll_records(consumer, 2)
    poll_until(consumer, lambda: 1 in moved())
    # It goes on to commit the same, as often as it is polled.
    requests: list[Any] = []
    request = ConsumerCoordinator._send_offset_commit_request

    def count(coordinator: Any, offsets: Any) -> Any:
        requests.append(offsets)
        return request(coordinator, offsets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConsumerCoordinator, "_send_offset_commit_request", count)
        poll_until(consumer, lambda: len(requests) >= 3)
    consumer.close()
    # There may be some from before all the records had come.
    *before, last = moved()
    assert last == 1
    assert len({*before, last}) == len(before) + 1


def test_an_auto_commit_at_close_makes_a_span(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(commit_spans="all")
    clients.send(b"1", b"2")
    consumer = auto_committing(clients, auto_commit_interval_ms=3600_000)
    poll_records(consumer, 2)
    assert commits(recorder) == []
    consumer.close()
    span = recorder.one(f"commit {topic}")
    assert span.parent is None
    assert attributes_of([span])[0]["messaging.kafka.offset"] == 1


def test_a_restarted_consumer_with_nothing_new_makes_none(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(commit_spans="all")
    clients.send(b"1", b"2")
    first = auto_committing(clients, auto_commit_interval_ms=3600_000)
    poll_records(first, 2)
    first.close()
    again = auto_committing(clients, auto_commit_interval_ms=3600_000)
    poll_until(again, lambda: bool(again.assignment()))
    assert again.position(TopicPartition(topic, 0)) == 2
    again.close()
    assert commits(recorder) == [f"commit {topic}"]


@pytest.mark.skipif(VERSION >= (3, 0), reason="the I/O thread is in the background")
def test_a_rebalance_auto_commits_once_on_the_way_of_a_poll(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(commit_spans="all")
    _commit_before_a_rebalance(clients, recorder)


@pytest.mark.skipif(VERSION < (3, 0), reason="all is on the application's thread")
def test_a_rebalance_auto_commits_once_in_the_background(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(commit_spans="all")
    _commit_before_a_rebalance(clients, recorder)


def _commit_before_a_rebalance(clients: Clients, recorder: Recorder) -> None:
    clients.send(b"1", b"2")
    consumer = auto_committing(clients, auto_commit_interval_ms=3600_000)
    poll_records(consumer, 2)
    assert commits(recorder) == []
    consumer._coordinator.request_rejoin()
    poll_until(consumer, lambda: bool(commits(recorder)))
    span = recorder.one(f"commit {clients.topic}")
    assert attributes_of([span])[0]["messaging.kafka.offset"] == 1
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("way", ["commit", "commit_async"])
def test_a_commit_that_moves_no_offset_is_measured_and_makes_no_span(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str, way: str
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)

    def commit() -> None:
        future = getattr(consumer, way)()
        until(lambda: future is None or future.is_done, consumer.topics)

    poll(consumer)
    commit()
    commit()
    clients.send(b"2")
    poll(consumer)
    commit()
    assert [
        attributes["messaging.kafka.offset"]
        for attributes in attributes_of(recorder.named(f"commit {topic}"))
    ] == [0, 1]
    assert measured(recorder) == 3


def test_a_commit_that_is_interrupted_has_an_error_and_no_exception(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def commit(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ConsumerCoordinator, "commit_offsets_sync", commit)
    instrument()
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    poll(consumer)
    with pytest.raises(KeyboardInterrupt):
        consumer.commit()
    span = recorder.one(f"commit {topic}")
    assert attributes_of([span])[0]["error.type"] == "KeyboardInterrupt"
    assert span.events == ()
    KafkaPythonInstrumentor().uninstrument()


def test_a_group_that_starts_again_commits_nothing_new(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    first = clients.consumer(group_id=topic)
    poll(first)
    first.commit()
    first.close()
    again = clients.consumer(group_id=topic)
    poll_until(again, lambda: bool(again.assignment()))
    assert again.position(TopicPartition(topic, 0)) == 1
    again.commit()
    assert commits(recorder) == [f"commit {topic}"]
    assert measured(recorder) == 2


@pytest.fixture
def refused() -> Callable[[], AbstractContextManager[Any]]:
    """Has all commits refused; no broker does at a moment that is known."""
    error = kafka.errors.GroupAuthorizationFailedError()

    async def refuse_later(*_: Any) -> Any:
        raise error

    refuse = refuse_later if VERSION >= (3, 0) else lambda *_: Future().failure(error)

    @contextlib.contextmanager
    def refusing() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(ConsumerCoordinator, "_send_offset_commit_request", refuse)
            yield

    return refusing


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "suppressed"])
def test_a_commit_that_failed_has_moved_nothing(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    refused: Callable[[], AbstractContextManager[Any]],
    traced: bool,
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    poll(consumer)
    with refused(), contextlib.nullcontext() if traced else suppress_instrumentation():
        consumer.commit()
    consumer.commit()
    last = recorder.named(f"commit {topic}")[-1]
    assert last.status.status_code is StatusCode.UNSET
    assert len(commits(recorder)) == (2 if traced else 1)


def test_a_commit_that_would_move_nothing_fails_without_a_trace_of_the_next(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    refused: Callable[[], AbstractContextManager[Any]],
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    poll_records(consumer, 1)
    consumer.commit()
    with refused():
        consumer.commit()
    consumer.commit()
    assert len(commits(recorder)) == 1
    assert measured(recorder) == 3


@pytest.mark.parametrize("lacks", ["module", "method"])
@pytest.mark.parametrize("given", [True, False], ids=["offsets", "no offsets"])
def test_where_kafka_python_lacks_the_methods_the_public_ones_are_traced(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
    given: bool,
    lacks: str,
) -> None:
    # Stands for a version that is not out yet.
    if lacks == "module":
        monkeypatch.setitem(sys.modules, "kafka.coordinator.consumer", None)
    else:
        monkeypatch.setattr(_kafka, "_COMMITS", (*_kafka._COMMITS, "commit_offsets"))
    instrument(commit_spans="all")
    clients.send(b"1", b"2")
    consumer = clients.consumer(group_id=topic)
    poll_records(consumer, 2)
    consumer.commit(committable(topic, 1) if given else None)
    future = consumer.commit_async(committable(topic, 2) if given else None)
    poll_until(consumer, lambda: bool(future.is_done))
    name = f"commit {topic}" if given else "commit"
    assert commits(recorder) == [name, name]
    told = attributes_of(recorder.named(name))
    assert [each["messaging.consumer.group.name"] for each in told] == [topic] * 2
    offsets = [each.get("messaging.kafka.offset") for each in told]
    assert offsets == ([0, 1] if given else [None, None])
    with pytest.raises(Exception):  # noqa: B017 (differs between versions)
        clients.consumer().commit()
    assert len(commits(recorder)) == 3
    KafkaPythonInstrumentor().uninstrument()
    assert not hasattr(KafkaConsumer.commit, "__wrapped__")


def test_commits_that_have_no_answer_end_with_the_consumer(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    poll(consumer)
    consumer.commit_async()
    consumer.close()
    del consumer
    clients._made.pop()
    deadline = time.monotonic() + DEADLINE
    while recorder.open() and time.monotonic() < deadline:
        clients.send(b"2")  # ends what finalisers have left behind
    assert recorder.open() == []
    assert len(commits(recorder)) == 1


def test_it_is_the_answer_and_not_the_look_up_of_the_coordinator_that_ends_it(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    poll(consumer)
    consumer.commit(committable(topic, 0))  # by which the coordinator is connected
    recorder.ended.clear()
    # No broker refuses a commit at a moment that is known.
    answer = Future()

    async def wait_for_it(*_: Any) -> Any:
        return await answer

    request = wait_for_it if VERSION >= (3, 0) else lambda *_: answer
    monkeypatch.setattr(ConsumerCoordinator, "_send_offset_commit_request", request)
    consumer._coordinator.coordinator_dead("as when it has moved")
    looked_up = consumer.commit_async(committable(topic, 1))
    until(lambda: looked_up.is_done, consumer.topics)
    assert commits(recorder) == []
    answer.failure(kafka.errors.GroupAuthorizationFailedError(topic))
    until(lambda: bool(commits(recorder)), consumer.topics)
    (attributes,) = attributes_of([recorder.one(f"commit {topic}")])
    assert attributes["error.type"] == "GROUP_AUTHORIZATION_FAILED"
    assert attributes["network.peer.address"] == "127.0.0.1"


def test_commits_whose_coordinator_is_not_found_are_not_kept(
    instrumented: None,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    consumer = clients.consumer(group_id=topic)

    def look_up(*_: Any) -> Any:
        return Future().failure(kafka.errors.NodeNotReadyError("as in an outage"))

    monkeypatch.setattr(ConsumerCoordinator, "lookup_coordinator", look_up)

    def look_ups() -> list[PendingCommit]:
        # `isinstance` would ask a weak proxy whose object is gone.
        return [
            each for each in gc.get_objects() if issubclass(type(each), PendingCommit)
        ]

    before = look_ups()
    offsets = committable(topic, 1)
    settled: list[Any] = []
    for _ in range(5):
        consumer.commit_async(offsets, lambda *answer: settled.append(answer))
    assert commits(recorder) == [f"commit {topic}"] * 5
    kept = [each for each in look_ups() if all(each is not old for old in before)]
    assert kept == []


def test_threads_that_commit_have_each_commit_measured(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(commit_spans="all")
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    poll(consumer)
    # Up to 2.3 a consumer is for one thread at a time.
    lock = contextlib.nullcontext() if VERSION >= (3, 0) else threading.Lock()

    def commit(_: int) -> None:
        with lock:
            consumer.commit(committable(topic, 1))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(commit, range(40)))
    assert measured(recorder) == 40


def test_what_a_callback_commits_while_the_consumer_closes_is_asked_for(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2")
    consumer = auto_committing(clients, auto_commit_interval_ms=3600_000)
    poll_records(consumer, 2)

    def commit_again(*_: Any) -> None:
        consumer.commit(committable(topic, 1))

    future = consumer.commit_async(committable(topic, 2), commit_again)
    until(lambda: future.is_done, consumer.topics)
    consumer.close()
    assert measured(recorder) == 3
    spans = attributes_of(recorder.named(f"commit {topic}"))
    assert [span["messaging.kafka.offset"] for span in spans] == [1, 0]


class Incomparable:
    """A callback that does not want to be compared."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    __hash__ = None  # type: ignore[assignment]  # as with `__eq__` alone

    def __call__(self, *_: Any) -> None:
        pass


def test_the_applications_callback_is_not_compared(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    consumer = clients.consumer(group_id=topic)
    poll(consumer)
    future = consumer.commit_async(committable(topic, 1), Incomparable())
    until(lambda: future.is_done, consumer.topics)
    assert commits(recorder) == [f"commit {topic}"]


def test_a_suppressed_commit_has_moved_the_offset(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(commit_spans="all")
    clients.send(b"1")
    consumer = auto_committing(clients, auto_commit_interval_ms=3600_000)
    poll(consumer)
    with suppress_instrumentation():
        consumer.commit()
    consumer.close()
    assert commits(recorder) == []


def test_a_suppressed_commit_leaves_unknown_what_the_broker_has(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1", b"2")
    consumer = clients.consumer(group_id=topic)
    poll_records(consumer, 2)
    consumer.commit(committable(topic, 2))
    with suppress_instrumentation():
        future = consumer.commit_async(committable(topic, 1))
    until(lambda: future.is_done, consumer.topics)
    consumer.commit(committable(topic, 2))
    assert len(commits(recorder)) == 2


@pytest.mark.skipif(VERSION < (3, 0), reason="it commits as any other")
def test_a_commit_before_a_rebalance_makes_no_span_unless_asked_for(
    instrumented: None, clients: Clients, recorder: Recorder, topic: str
) -> None:
    clients.send(b"1")
    consumer = auto_committing(clients, auto_commit_interval_ms=3600_000)
    poll_records(consumer, 1)
    consumer._coordinator.request_rejoin()
    poll_until(consumer, lambda: bool(measured(recorder)))
    assert commits(recorder) == []


def test_a_request_is_that_of_the_commit_with_its_own_offsets() -> None:
    ledger, commits = CommitLedger(), [Mock(), Mock()]
    first, second = (PendingCommit(ledger, {}, commit) for commit in commits)
    ledger.waiting += first, second
    assert ledger.take(second.offsets) is second.commit
    assert ledger.take(second.offsets) is None
    assert not ledger.remove(second)
    assert ledger.waiting == [first]


class Fake:
    """A method of a coordinator that returns a result, or raises that as an exception.

    What it is called with, it only notes.
    """

    def __init__(self, name: str, result: Any, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, Any]] = []
        self._name = name

        def method(_: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((args, kwargs))
            if isinstance(result, BaseException):
                raise result
            return result

        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs)

        plain = getattr(ConsumerCoordinator, name)
        self._is_coroutine = inspect.iscoroutinefunction(plain)
        replaced = coroutine if self._is_coroutine else method
        patch.setattr(ConsumerCoordinator, name, replaced)

    def call(self, consumer: Any, *args: Any, **kwargs: Any) -> Any:
        """What the method of this consumer's coordinator returns or raises."""
        try:
            result = getattr(consumer._coordinator, self._name)(*args, **kwargs)
            return result.send(None) if self._is_coroutine else result
        except StopIteration as stopped:
            return stopped.value
        except BaseException as raised:
            return raised


COMMITS = (_kafka.COMMIT_SYNC, _kafka.COMMIT_ASYNC, _kafka.COMMIT_COROUTINE)
OTHERS = (
    _kafka.REQUEST_ASYNC,
    _kafka.AUTO_COMMIT_SYNC,
    _kafka.FETCH_COMMITTED,
    _kafka.FETCH_COMMITTED_COROUTINE,
)


@pytest.fixture
def patched(instrument: Instrument, clients: Clients) -> Iterator[pytest.MonkeyPatch]:
    """For fakes that are there before the instrumentation and after it."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch
        KafkaPythonInstrumentor().uninstrument()


@pytest.mark.parametrize("traced", [True, False], ids=["traced", "suppressed"])
@pytest.mark.parametrize("error", [None, ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    "name", [each for each in (*COMMITS, *OTHERS) if hasattr(ConsumerCoordinator, each)]
)
def test_what_a_coordinator_is_given_returns_and_raises_stays_as_it_is(
    instrument: Instrument,
    patched: pytest.MonkeyPatch,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    name: str,
    error: BaseException | None,
    traced: bool,
) -> None:
    consumer, offsets = clients.consumer(group_id=topic), committable(topic, 1)
    result: Any = Future() if error is None else error
    fake = Fake(name, result, patched)
    instrument(commit_spans="all")
    with contextlib.nullcontext() if traced else suppress_instrumentation():
        assert fake.call(consumer, offsets, more=1) is result
    assert fake.calls == [((offsets,), {"more": 1})]
    result.success(None) if error is None else None
    assert recorder.open() == []
    error_types = [each.get("error.type") for each in attributes_of(recorder.ended)]
    expected = None if error is None else type(error).__name__
    # What the client's own thread commits is in no context of the application's.
    is_traced = name in COMMITS and (traced or name == _kafka.COMMIT_COROUTINE)
    assert error_types == [expected] * is_traced


@pytest.mark.parametrize("error", [None, ValueError("no"), KeyboardInterrupt()])
def test_a_request_that_is_made_later_ends_its_commit(
    instrument: Instrument,
    patched: pytest.MonkeyPatch,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    error: BaseException | None,
) -> None:
    consumer, offsets = clients.consumer(group_id=topic), committable(topic, 1)
    looked_up = Fake(_kafka.COMMIT_ASYNC, Future(), patched)
    result: Any = Future() if error is None else error
    request = Fake(_kafka.REQUEST_ASYNC, result, patched)
    instrument()
    looked_up.call(consumer, offsets)
    assert recorder.open() == [f"commit {topic}"]
    assert request.call(consumer, offsets, more=1) is result
    assert request.calls == [((offsets,), {"more": 1})]
    if error is None:
        assert recorder.open() == [f"commit {topic}"]
        result.success(None)
    (attributes,) = attributes_of([recorder.one(f"commit {topic}")])
    assert attributes.get("error.type") == (error and type(error).__name__)


def test_a_commit_that_cannot_be_made_is_not_kept(
    instrument: Instrument, patched: pytest.MonkeyPatch, clients: Clients, topic: str
) -> None:
    consumer, offsets = clients.consumer(group_id=topic), committable(topic, 1)
    error = ValueError("no")
    fake = Fake(_kafka.COMMIT_ASYNC, error, patched)
    instrument()
    assert fake.call(consumer, offsets) is error
    error.__traceback__ = None
    assert [
        each
        for each in gc.get_objects()
        if issubclass(type(each), PendingCommit) and each.offsets is offsets
    ] == []


@pytest.mark.parametrize(
    "name",
    [each for each in OTHERS if "fetch" in each and hasattr(ConsumerCoordinator, each)],
)
def test_what_the_broker_has_is_known_by_each_way_of_asking_for_it(
    instrument: Instrument,
    patched: pytest.MonkeyPatch,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    name: str,
) -> None:
    consumer, offsets = clients.consumer(group_id=topic), committable(topic, 1)
    fetch = Fake(name, offsets, patched)
    commit = Fake(_kafka.COMMIT_SYNC, None, patched)
    instrument()
    assert fetch.call(consumer, list(offsets)) is offsets
    commit.call(consumer, offsets)
    assert measured(recorder) == 1
    assert commits(recorder) == []


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_an_auto_commit_is_over_when_its_call_is(
    instrument: Instrument,
    patched: pytest.MonkeyPatch,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    error: BaseException | None,
) -> None:
    consumer = clients.consumer(group_id=topic)
    auto = Fake(_kafka.AUTO_COMMIT_SYNC, error, patched)
    commit = Fake(_kafka.COMMIT_SYNC, None, patched)
    instrument()
    assert auto.call(consumer) is error
    commit.call(consumer, committable(topic, 1))
    assert commits(recorder) == [f"commit {topic}"]


@pytest.mark.skipif(VERSION < (3, 0), reason="there are no coroutines")
@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_a_commit_by_a_coroutine_belongs_to_no_call_and_no_span(
    instrument: Instrument,
    patched: pytest.MonkeyPatch,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    error: BaseException | None,
) -> None:
    """It may run in a thread that has inherited a span, after a call that is over."""
    consumer, offsets = clients.consumer(group_id=topic), committable(topic, 1)
    call = Fake(_kafka.COMMIT_SYNC, error, patched)
    coroutine = Fake(_kafka.COMMIT_COROUTINE, None, patched)
    instrument(commit_spans="all")
    call.call(consumer, offsets)
    recorder.ended.clear()
    with recorder.tracer.start_as_current_span("work"):
        coroutine.call(consumer, offsets)
        coroutine.call(consumer, committable(topic, 2))
    assert recorder.one(f"commit {topic}" if error is None else "work").parent is None
    assert all(span.parent is None for span in recorder.ended)
    assert measured(recorder) == 3


def test_a_layer_that_returns_no_future_ends_the_commit(
    instrument: Instrument,
    patched: pytest.MonkeyPatch,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    log: Log,
) -> None:
    consumer = clients.consumer(group_id=topic)
    fake = Fake(_kafka.COMMIT_ASYNC, None, patched)
    instrument()
    assert fake.call(consumer, committable(topic, 1)) is None
    assert commits(recorder) == [f"commit {topic}"]
    (message,) = log.take()
    assert message.startswith("Failed to follow a commit")


@pytest.fixture
def answer(
    instrument: Instrument, patched: pytest.MonkeyPatch, clients: Clients, topic: str
) -> Future:
    """The answer to a commit of one offset, which waits for it."""
    answer = Future()
    fake = Fake(_kafka.COMMIT_ASYNC, answer, patched)
    instrument()
    fake.call(clients.consumer(group_id=topic), committable(topic, 1))
    return answer


def test_an_answer_after_a_commit_was_given_up_changes_nothing(
    answer: Future, recorder: Recorder, topic: str
) -> None:
    _endings.abandon_all()
    answer.failure(kafka.errors.GroupAuthorizationFailedError(topic))
    (attributes,) = attributes_of([recorder.one(f"commit {topic}")])
    assert attributes["error.type"] == "outcome_unknown"
    assert measured(recorder) == 1


def test_a_commit_that_is_given_up_ends_at_that_moment(
    answer: Future, patched: pytest.MonkeyPatch, recorder: Recorder, topic: str
) -> None:
    moment = time.monotonic_ns() + 10**12
    patched.setattr(_endings, "Clock", SimpleNamespace(monotonic_ns=lambda: moment))
    _endings.abandon_all()
    span = recorder.one(f"commit {topic}")
    assert (span.end_time or 0) - (span.start_time or 0) >= 10**12


@pytest.mark.parametrize(
    ("end", "logged"),
    [
        (lambda answer: answer.failure(kafka.errors.KafkaTimeoutError()), 1),
        (lambda _: _endings.abandon_all(), 0),
    ],
    ids=["failed", "given up"],
)
def test_an_interrupt_while_a_commit_fails_leaves_no_span_open(
    answer: Future,
    patched: pytest.MonkeyPatch,
    recorder: Recorder,
    log: Log,
    end: Callable[[Future], object],
    logged: int,
) -> None:
    (span,) = recorder.started
    patched.setattr(span, "set_attributes", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        end(answer)
    assert recorder.open() == []
    assert len(log.take()) == logged


def test_an_interrupt_while_a_commit_fails_leaves_the_peer_to_its_span(
    instrument: Instrument,
    patched: pytest.MonkeyPatch,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    log: Log,
) -> None:
    clients.send(b"1")
    consumer, answer = clients.consumer(group_id=topic), Future()
    poll(consumer)
    fake = Fake(_kafka.COMMIT_ASYNC, answer, patched)
    instrument()
    fake.call(consumer, committable(topic, 1))
    (span,) = recorder.started
    patched.setattr(span, "record_exception", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        answer.failure(kafka.errors.GroupAuthorizationFailedError(topic))
    (attributes,) = attributes_of([recorder.one(f"commit {topic}")])
    assert attributes["network.peer.address"] == "127.0.0.1"
    assert len(log.take()) == 1


def test_a_coordinator_that_cannot_be_read_costs_the_peer_alone(
    instrument: Instrument,
    patched: pytest.MonkeyPatch,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    log: Log,
) -> None:
    consumer = clients.consumer(group_id=topic)
    fake = Fake(_kafka.COMMIT_SYNC, None, patched)
    patched.setattr(consumer._coordinator, "coordinator_id", [])  # no broker's number
    instrument()
    fake.call(consumer, committable(topic, 1))
    (attributes,) = attributes_of([recorder.one(f"commit {topic}")])
    assert "network.peer.address" not in attributes
    assert attributes.keys() >= {"messaging.kafka.offset", "server.address"}
    (message,) = log.take()
    assert message.startswith("Failed to read the coordinator of a group")


def test_a_coordinator_without_a_hash_has_its_commits_traced(
    instrument: Instrument,
    patched: pytest.MonkeyPatch,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    log: Log,
) -> None:
    consumer = clients.consumer(group_id=topic)
    fake = Fake(_kafka.COMMIT_SYNC, None, patched)
    patched.setattr(ConsumerCoordinator, "__hash__", None)
    instrument()
    fake.call(consumer, committable(topic, 1))
    assert commits(recorder) == [f"commit {topic}"]
    (message,) = log.take()
    assert message.startswith("Failed to keep the ledger of a consumer's commits")


class Unreadable(dict[Any, Any]):
    """Offsets that cannot be read."""

    def items(self) -> Any:
        raise RuntimeError("no offsets today")


def test_offsets_that_cannot_be_read_are_passed_on_and_not_traced(
    instrument: Instrument,
    patched: pytest.MonkeyPatch,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    log: Log,
) -> None:
    consumer, offsets, result = clients.consumer(group_id=topic), Unreadable(), object()
    fake = Fake(_kafka.COMMIT_SYNC, result, patched)
    instrument()
    assert fake.call(consumer, offsets) is result
    assert fake.calls == [((offsets,), {})]
    assert recorder.started == []
    assert [message.partition(";")[0] for message in log.take()] == [
        "Failed to trace a commit", "Failed to read committed offsets",
    ]  # fmt: skip
