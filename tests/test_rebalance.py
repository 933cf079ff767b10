"""Rebalances while messages flow: two members of a group."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from kafka.errors import CommitFailedError
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from clients import DEADLINE, Clients, poll
from conftest import Instrument
from otel_kafka_python import _endings, process_span
from recorder import Recorder

PARTITIONS = 4
MESSAGES = 200

# A poll that times out in the middle of a join can lose what it is then assigned, in
# kafka-python 3.0.12, and is never assigned anything again: none does here.
LONG_MS = 1000 * DEADLINE

pytestmark = pytest.mark.usefixtures("gives_away")


def member(clients: Clients, **config: Any) -> Any:
    return clients.consumer(
        group_id=clients.topic,
        session_timeout_ms=6000,
        heartbeat_interval_ms=500,
        **config,
    )


@pytest.fixture
def flowing(instrument: Instrument, clients: Clients) -> Clients:
    """A topic of some partitions, each with messages."""
    instrument(commit_spans="all")
    clients.create_topic(PARTITIONS)
    producer = clients.producer()
    for number in range(MESSAGES):
        producer.send(clients.topic, b"%d" % number, partition=number % PARTITIONS)
    producer.flush()
    return clients


class Member(threading.Thread):
    """A member of the group that handles what it gets, the last when it is to leave."""

    def __init__(self, consumer: Any, way: str) -> None:
        super().__init__()
        self.consumer = consumer
        self.way = way
        self.handled: list[tuple[Any, Any]] = []
        self.leave = threading.Event()
        self.errors: list[BaseException] = []
        self.left_current = True

    def run(self) -> None:
        try:
            while not self.leave.is_set():
                getattr(self, self.way)()
        except BaseException as error:
            self.errors.append(error)
        finally:
            self.left_current = trace.get_current_span() is not trace.INVALID_SPAN
            self.consumer.close()

    def handle(self, record: Any) -> None:
        self.handled.append((str(record.partition), record.offset))

    def loop(self) -> None:
        for record in self.consumer:
            self.handle(record)
            if self.leave.is_set():
                return

    def poll(self) -> None:
        for records in self.consumer.poll(timeout_ms=LONG_MS, max_records=7).values():
            for record in records:
                self.handle(record)

    def batch(self) -> None:
        polled = self.consumer.poll(timeout_ms=LONG_MS, max_records=7)
        if polled:
            with process_span(polled, self.consumer):
                for records in polled.values():
                    for record in records:
                        self.handle(record)


def send_to_each_partition(producer: Any, topic: str) -> None:
    for partition in range(PARTITIONS):
        producer.send(topic, b"more", partition=partition)
    producer.flush()


def pause() -> None:
    """Let the members' threads work."""
    threading.Event().wait(0.02)


def wait_until(
    happened: Callable[[], Any],
    work: Callable[[], Any] = pause,
    within: float = DEADLINE,
) -> None:
    """Work until something has happened."""
    deadline = time.monotonic() + within
    while not happened():
        assert time.monotonic() < deadline
        work()


@pytest.mark.parametrize("way", ["loop", "poll", "batch"])
def test_each_delivery_is_accounted_for_once_while_members_come_and_go(
    flowing: Clients, recorder: Recorder, topic: str, way: str
) -> None:
    # What a record is delivered again for is kafka-python's; that each delivery has
    # its span, and no other, is ours.
    first = Member(member(flowing, enable_auto_commit=True), way)
    first.start()
    wait_until(lambda: first.handled)
    second = Member(member(flowing, enable_auto_commit=True), way)
    second.start()
    wait_until(second.consumer.assignment)
    producer = flowing.producer()

    def go_on() -> None:
        send_to_each_partition(producer, topic)

    wait_until(lambda: second.handled, go_on)
    # One goes, the other takes its partitions and goes on.
    first.leave.set()
    go_on()
    first.join(DEADLINE)
    wait_until(lambda: len(second.consumer.assignment()) == PARTITIONS)
    before = len(second.handled)
    go_on()
    wait_until(lambda: len(second.handled) > before)
    # Where the machine is slow there are records that no one has got yet.
    wait_until(lambda: len(first.handled + second.handled) >= MESSAGES)
    second.leave.set()
    go_on()
    second.join(DEADLINE)
    assert not first.is_alive()
    assert not second.is_alive()
    assert first.errors == second.errors == []
    assert not first.left_current
    assert not second.left_current
    assert recorder.open() == []
    delivered = Counter(first.handled + second.handled)
    assert sum(delivered.values()) >= MESSAGES
    spans = recorder.named(f"process {topic}")
    if way == "batch":
        # A batch of one has its message on the span itself.
        assert sum(max(1, len(span.links)) for span in spans) == sum(delivered.values())
    else:
        assert Counter(map(position, spans)) == delivered
    counted = sum(delivered.values())
    assert recorder.count("messaging.client.consumed.messages") == counted


def in_a_loop(consumer: Any, body: Callable[[Any], bool]) -> None:
    for record in consumer:
        if body(record):
            break


def in_polled_batches(consumer: Any, body: Callable[[Any], bool]) -> None:
    for records in poll(consumer).values():
        for record in records:
            if body(record):
                return


def in_process_spans(consumer: Any, body: Callable[[Any], bool]) -> None:
    for records in poll(consumer).values():
        for record in records.copy():
            with process_span(record, consumer):
                if body(record):
                    return


def position(span: ReadableSpan) -> tuple[Any, Any]:
    attributes = span.attributes or {}
    return (
        attributes["messaging.destination.partition.id"],
        attributes["messaging.kafka.offset"],
    )


@pytest.mark.parametrize("way", [in_a_loop, in_polled_batches, in_process_spans])
def test_partitions_that_are_revoked_in_the_middle(
    flowing: Clients, recorder: Recorder, topic: str, way: Callable[..., None]
) -> None:
    consumer, other = member(flowing), member(flowing)
    producer = flowing.producer()
    handled: list[Any] = []
    joined = threading.Event()

    def join() -> None:
        poll(other)
        joined.set()
        # The first member may have read everything that it still has, and wait.
        send_to_each_partition(producer, topic)

    def revoke() -> None:
        """Have the other member take partitions away."""
        # The assignment is empty before the rebalance has come to its end, which
        # needs the polls of both.
        joining = threading.Thread(target=join)
        joining.start()
        wait_until(
            joined.is_set, lambda: consumer.poll(timeout_ms=LONG_MS, max_records=1)
        )
        joining.join(DEADLINE)
        assert len(consumer.assignment()) < PARTITIONS

    def body(record: Any) -> bool:
        handled.append((str(record.partition), record.offset))
        if len(handled) == 3:
            span = trace.get_current_span()
            revoke()
            assert trace.get_current_span() is span
        return len(handled) == 5

    way(consumer, body)
    # A loop that is left while another thread collects ends with the next operation.
    _endings.abandon_deferred()
    assert len(handled) == 5
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert [position(span) for span in recorder.named(f"process {topic}")] == handled
    assert recorder.open() == []


def test_a_commit_after_a_rebalance_fails_with_the_error_in_its_span(
    flowing: Clients, recorder: Recorder, topic: str
) -> None:
    # Polls too late, and is put out of its group.
    late = member(flowing, max_poll_interval_ms=6000, max_poll_records=5)
    poll(late)
    other = member(flowing)
    wait_until(
        lambda: len(other.assignment()) == PARTITIONS,
        lambda: other.poll(timeout_ms=LONG_MS, max_records=1),
        within=2 * DEADLINE,
    )
    with pytest.raises(CommitFailedError):
        late.commit()
    (span,) = [s for s in recorder.named(f"commit {topic}") if s.events]
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "CommitFailedError"
