"""Brokers that are killed and frozen, and come back: what is told is the truth.

All of it on Apache Kafka. What a producer of 3.0 leaves undone when its broker dies is
in tests/test_lifecycle.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import kafka.errors
import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from apache_broker import ApacheBroker, Node
from clients import DEADLINE, Clients, poll_records
from conftest import Instrument
from deliveries import (
    Outcomes,
    assert_failed,
    assert_the_truth,
    carried,
    held_records,
    ids,
    partitions_of,
    send_each,
    send_until_one_arrives,
    until_all_have_ended,
)
from pages import error_types
from recorder import Recorder

two_clients = pytest.mark.two_clients

# A broker that was killed cannot come back before its session has ended, nor can
# another become the leader.
PROPERTIES = """\
auto.create.topics.enable=false
broker.session.timeout.ms={session}
broker.heartbeat.interval.ms=500
"""

# A producer that gives messages up soon. Idempotent, one of 3.0 would never complete
# the futures that come after those it has given up, nor send anything any more.
IMPATIENT: dict[str, Any] = {
    "request_timeout_ms": 1500,
    "delivery_timeout_ms": 4000,
    "enable_idempotence": False,
}

EXACTLY_ONCE: dict[str, Any] = {"enable_idempotence": True, "acks": "all"}

LATENCY = "kafka.pipeline.latency"
MILLISECOND = 1_000_000  # in nanoseconds

# So many messages are sent before a fault, and so many after it.
MANY = 2000


@pytest.fixture(scope="module")
def own_broker(runs_apache: None) -> Iterator[ApacheBroker]:
    """A broker that a test may kill or freeze, if it has it run again at its end."""
    with ApacheBroker(properties=PROPERTIES.format(session=2000)) as broker:
        yield broker


@pytest.fixture
def node(own_broker: ApacheBroker) -> Node:
    (node,) = own_broker.nodes
    return node


@pytest.fixture
def own_clients(own_broker: ApacheBroker, topic: str) -> Iterator[Clients]:
    made = clients_of(own_broker, topic)
    made.create_topic(1)
    yield made
    made.close()


def clients_of(broker: ApacheBroker, topic: str) -> Clients:
    """Clients that look often for a broker that has gone."""
    return Clients(broker.address, topic, reconnect_backoff_max_ms=200)


@pytest.fixture
def instrumented(instrument: Instrument) -> None:
    """Has what is told of pipelines be the truth, too."""
    instrument(pipeline_latency=True)


@contextmanager
def frozen(node: Node) -> Iterator[None]:
    node.freeze()
    try:
        yield
    finally:
        node.thaw()


@contextmanager
def killed(node: Node) -> Iterator[None]:
    node.kill()
    try:
        yield
    finally:
        node.start()


def keys(name: str) -> list[str]:
    return [f"{name}-{number}" for number in range(MANY)]


def read_one(consumer: Any) -> None:
    consumer.count = 1
    for _ in consumer:
        pass


def begin(clients: Clients, **config: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A producer, a consumer that has read its first message, and what was sent."""
    producer, consumer = clients.producer(**config), clients.finite(1)
    sent: dict[str, Any] = {}
    send_until_one_arrives(producer, clients.topic, sent)
    read_one(consumer)
    return producer, consumer, sent


def settle(
    clients: Clients, recorder: Recorder, sent: dict[str, Any]
) -> tuple[Outcomes, list[Any]]:
    """What has become of all messages, and what the broker holds of them."""
    until_all_have_ended(recorder)
    records = held_records(clients, clients.topic)
    return assert_the_truth(recorder, clients.topic, sent, records), records


def assert_goes_on_to_process(
    consumer: Any, recorder: Recorder, topic: str, records: list[Any]
) -> None:
    """A consumer that has read one goes on, and each links to what has sent it."""
    consumer.count = len(records) - 1
    for _ in consumer:
        pass
    linked = {}
    for span in recorder.named(f"process {topic}"):
        (link,) = span.links
        assert span.status.status_code is StatusCode.UNSET
        linked[place_of(span)] = ids(link)
    assert linked == {(each.partition, each.offset): carried(each) for each in records}
    assert len(recorder.named(f"process {topic}")) == len(records)
    assert recorder.count("messaging.client.consumed.messages") == len(records)
    assert_each_pipeline_is_measured(recorder, topic, records)
    sends = recorder.named(f"send {topic}")
    began = {ids(each): (each.start_time or 0) // MILLISECOND for each in sends}
    assert {carried(each): start_of(each) for each in records} == {
        each: (began[each], topic) for each in map(carried, records) if each
    }


def start_of(record: Any) -> tuple[int, str]:
    """When its pipeline began, in milliseconds, and in which topic."""
    name, _, start = dict(record.headers)["baggage"].decode().partition("=")
    assert name == "kafka.pipeline"
    began, _, source = start.partition("-")
    return int(began), source


def assert_each_pipeline_is_measured(
    recorder: Recorder, topic: str, records: list[Any]
) -> None:
    """Once for each processing, with the time since the start that came with it."""
    began = {(each.partition, each.offset): start_of(each)[0] for each in records}
    spans = recorder.named(f"process {topic}")
    took = sum(
        (each.end_time or 0) - began[place_of(each)] * MILLISECOND for each in spans
    )
    (point,) = recorder.points(LATENCY, messaging_destination_name=topic)
    assert point.count == len(spans) == len(records)
    assert point.sum == pytest.approx(took / 1e9)


def place_of(span: ReadableSpan) -> tuple[int, int]:
    attributes: dict[str, Any] = dict(span.attributes or {})
    partition = int(attributes["messaging.destination.partition.id"])
    return partition, attributes["messaging.kafka.offset"]


@two_clients
def test_killed_and_back_too_late_what_was_not_acknowledged_has_failed(
    instrumented: None,
    own_clients: Clients,
    node: Node,
    recorder: Recorder,
    topic: str,
) -> None:
    producer, consumer, sent = begin(own_clients, **IMPATIENT)
    sent |= send_each(producer, topic, keys("before"))
    with killed(node):
        lost = send_each(producer, topic, keys("after"))
        until_all_have_ended(recorder)
    sent |= lost
    again = send_until_one_arrives(producer, topic, sent)
    outcomes, records = settle(own_clients, recorder, sent)
    assert lost.keys() <= outcomes.failed.keys()
    assert again in outcomes.delivered
    assert_goes_on_to_process(consumer, recorder, topic, records)


@two_clients
def test_killed_and_back_in_time_every_message_arrives_once(
    instrumented: None,
    own_clients: Clients,
    node: Node,
    recorder: Recorder,
    topic: str,
) -> None:
    producer, consumer, sent = begin(own_clients, **EXACTLY_ONCE)
    sent |= send_each(producer, topic, keys("before"))
    with killed(node):
        sent |= send_each(producer, topic, keys("after"))
    outcomes, records = settle(own_clients, recorder, sent)
    assert outcomes.delivered == sent.keys()
    assert len(records) == len(sent)
    assert_goes_on_to_process(consumer, recorder, topic, records)


@two_clients
def test_frozen_and_thawed_in_time_every_span_lasts_until_then(
    instrumented: None,
    own_clients: Clients,
    node: Node,
    recorder: Recorder,
    topic: str,
) -> None:
    producer, consumer, sent = begin(own_clients, **EXACTLY_ONCE)
    sent |= send_each(producer, topic, keys("before"))
    with frozen(node):
        waiting = send_each(producer, topic, keys("after"))
        thawed = time.time_ns()
    sent |= waiting
    outcomes, records = settle(own_clients, recorder, sent)
    assert outcomes.delivered == sent.keys()
    assert len(records) == len(sent)
    for span in recorder.named(f"send {topic}"):
        if (span.attributes or {})["messaging.kafka.message.key"] in waiting:
            assert (span.start_time or 0) < thawed < (span.end_time or 0)
    assert_goes_on_to_process(consumer, recorder, topic, records)


@two_clients
def test_frozen_in_the_middle_of_a_pipeline_each_processing_is_measured_once(
    instrumented: None,
    own_broker: ApacheBroker,
    own_clients: Clients,
    node: Node,
    recorder: Recorder,
    topic: str,
) -> None:
    target = f"{topic}-next"
    clients_of(own_broker, target).create_topic(1)
    first = send_each(own_clients.producer(**EXACTLY_ONCE), topic, ["0", "1", "2"])
    _, received = settle(own_clients, recorder, first)
    gives_up = {**IMPATIENT, "request_timeout_ms": 500, "delivery_timeout_ms": 1000}
    producer = own_clients.producer(**gives_up)
    handed_on: dict[str, Any] = {}
    for record in own_clients.finite(len(received)):
        with frozen(node) if record.offset == 1 else nullcontext():
            key = f"{record.offset}"
            handed_on |= send_each(producer, target, [key])
            with suppress(kafka.errors.KafkaError):
                handed_on[key].get(DEADLINE)
    until_all_have_ended(recorder)
    records = held_records(own_clients, target)
    outcomes = assert_the_truth(recorder, target, handed_on, records)
    assert "1" in outcomes.failed
    # What has failed is measured only if it was written all the same.
    for record in own_clients.consumer(target):
        if record.offset == len(records) - 1:
            break
    assert_each_pipeline_is_measured(recorder, topic, received)
    assert_each_pipeline_is_measured(recorder, target, records)
    starts = {f"{each.offset}": start_of(each) for each in received}
    assert {source for _, source in starts.values()} == {topic}
    for each in records:
        assert start_of(each) == starts[each.key.decode()]


@two_clients
def test_frozen_for_too_long_what_has_failed_may_yet_be_written(
    instrumented: None,
    own_clients: Clients,
    node: Node,
    recorder: Recorder,
    topic: str,
) -> None:
    producer, consumer, sent = begin(own_clients, **IMPATIENT)
    deadline = time.monotonic() + DEADLINE
    written: set[str] = set()
    lost: dict[str, Any] = {}
    # Thawed, it mostly writes what it finds, and may be quicker to learn that it has
    # no session any more.
    while not written & lost.keys():
        assert time.monotonic() < deadline
        with frozen(node):
            lost |= send_each(producer, topic, keys(f"after-{len(sent)}"))
            until_all_have_ended(recorder)
        sent |= lost
        again = send_until_one_arrives(producer, topic, sent)
        until_all_have_ended(recorder)
        records = held_records(own_clients, topic)
        written = {record.key.decode() for record in records}
    outcomes = assert_the_truth(recorder, topic, sent, records)
    assert lost.keys() <= outcomes.failed.keys()
    assert again in outcomes.delivered
    assert_goes_on_to_process(consumer, recorder, topic, records)


@pytest.mark.skipif(
    "buffer_memory" not in KafkaProducer.DEFAULT_CONFIG,
    reason="since 2.1 a producer takes whatever it is given",
)
def test_a_full_buffer_is_what_send_raises(
    instrument: Instrument,
    own_clients: Clients,
    node: Node,
    recorder: Recorder,
    topic: str,
) -> None:
    producer = own_clients.producer(
        batch_size=1000, buffer_memory=10_000, max_block_ms=500
    )
    send_until_one_arrives(producer, topic, {})
    with frozen(node):
        plain: list[Any] = []
        while not plain or not isinstance(plain[-1], BaseException):
            plain += send_each(producer, topic, ["plain"]).values()
        instrument()
        refused = send_each(producer, topic, ["one", "two"])
    assert {type(each) for each in refused.values()} == {type(plain[-1])}
    sent = dict(refused)
    producer.flush()
    send_until_one_arrives(producer, topic, sent)
    until_all_have_ended(recorder)
    records = held_records(own_clients, topic)
    untraced = [each for each in records if carried(each) is None]
    assert len(untraced) == len(plain)  # the first one, and not the last
    traced = [each for each in records if carried(each) is not None]
    outcomes = assert_the_truth(recorder, topic, sent, traced)
    assert outcomes.errors == {"KafkaTimeoutError"}
    assert refused.keys() <= outcomes.raised.keys()


def assert_raises_as_without(
    instrument: Instrument, producer: Any, topic: str
) -> dict[str, Any]:
    """Have `send` raise, first without the instrumentation; the second is returned."""
    plain = send_each(producer, topic, ["plain"])
    instrument()
    traced = send_each(producer, topic, ["traced"])
    assert isinstance(plain["plain"], kafka.errors.KafkaTimeoutError)
    assert type(traced["traced"]) is type(plain["plain"])
    return traced


@two_clients
def test_metadata_that_does_not_come_of_a_missing_topic_is_what_send_raises(
    instrument: Instrument,
    own_clients: Clients,
    own_broker: ApacheBroker,
    recorder: Recorder,
    topic: str,
) -> None:
    producer = own_clients.producer(max_block_ms=500)
    missing = f"{topic}-missing"
    sent = assert_raises_as_without(instrument, producer, missing)
    clients_of(own_broker, missing).create_topic(1)
    arrived = send_until_one_arrives(producer, missing, sent)
    until_all_have_ended(recorder)
    records = held_records(own_clients, missing)
    outcomes = assert_the_truth(recorder, missing, sent, records)
    assert "traced" in outcomes.raised
    assert outcomes.errors == {"KafkaTimeoutError"}
    assert outcomes.delivered == {arrived}


@two_clients
def test_metadata_that_does_not_come_of_a_frozen_broker_is_what_send_raises(
    instrument: Instrument,
    own_clients: Clients,
    node: Node,
    recorder: Recorder,
    topic: str,
) -> None:
    producer = own_clients.producer(max_block_ms=500)
    with frozen(node):
        sent = assert_raises_as_without(instrument, producer, topic)
    arrived = send_until_one_arrives(producer, topic, sent)
    outcomes, _ = settle(own_clients, recorder, sent)
    assert "traced" in outcomes.raised
    assert outcomes.errors == {"KafkaTimeoutError"}
    assert outcomes.delivered == {arrived}


@two_clients
def test_a_commit_without_an_answer_fails_and_the_next_one_does_not(
    instrumented: None,
    own_clients: Clients,
    node: Node,
    recorder: Recorder,
    topic: str,
) -> None:
    own_clients.send(b"value")
    consumer = own_clients.consumer(group_id=topic)
    poll_records(consumer, 1)
    with (
        frozen(node),
        pytest.raises(kafka.errors.KafkaTimeoutError) as raised,
    ):
        consumer.commit(timeout_ms=500)
    consumer.commit()
    failed, committed = recorder.named(f"commit {topic}")
    assert_failed(failed, raised.value, "KafkaTimeoutError")
    assert committed.status.status_code is StatusCode.UNSET
    assert (committed.attributes or {})["messaging.kafka.offset"] == 0
    assert consumer.committed(TopicPartition(topic, 0)) == 1


def poll_once(consumer: Any) -> list[bytes]:
    polled = consumer.poll(timeout_ms=100).values()
    return [record.value for batch in polled for record in batch]


def loop_once(consumer: Any) -> list[bytes]:
    values = []
    for record in consumer:
        values.append(record.value)
    return values


READERS: dict[str, Callable[[Any], list[bytes]]] = {
    "poll": poll_once,
    "loop": loop_once,
}


def survive_a_deletion(
    clients: Clients, read: Callable[[Any], list[bytes]]
) -> list[bytes]:
    """What a consumer reads of a topic that is deleted and created again under it."""
    clients.create_topic(1)
    clients.send(b"old", b"old")
    consumer = clients.consumer(metadata_max_age_ms=200, consumer_timeout_ms=100)
    deadline = time.monotonic() + DEADLINE
    seen: list[bytes] = []
    while len(seen) < 2:
        assert time.monotonic() < deadline
        seen += read(consumer)
    admin = KafkaAdminClient(**clients.config)
    admin.delete_topics([clients.topic])
    admin.close()
    while consumer.assignment():
        assert time.monotonic() < deadline
        seen += read(consumer)
    clients.create_topic(1)
    clients.send(b"new", b"new")
    while len(seen) < 4:
        assert time.monotonic() < deadline
        seen += read(consumer)
    return seen


@two_clients
@pytest.mark.parametrize("way", READERS)
def test_a_topic_that_is_deleted_and_created_again_is_read_and_traced_again(
    instrument: Instrument,
    own_broker: ApacheBroker,
    recorder: Recorder,
    topic: str,
    way: str,
) -> None:
    plain, traced = (clients_of(own_broker, name) for name in (f"{topic}-plain", topic))
    try:
        expected = survive_a_deletion(plain, READERS[way])
        instrument()
        assert survive_a_deletion(traced, READERS[way]) == expected
    finally:
        plain.close()
        traced.close()
    assert expected == [b"old", b"old", b"new", b"new"]
    assert recorder.open() == []
    sends = recorder.named(f"send {topic}")
    name = "poll" if way == "poll" else "process"
    spans = recorder.named(f"{name} {topic}")
    assert [ids(link) for span in spans for link in span.links] == [
        ids(each) for each in sends
    ]
    assert recorder.names() == sorted(each.name for each in (*sends, *spans))
    assert {span.status.status_code for span in recorder.ended} == {StatusCode.UNSET}
    assert recorder.count("messaging.client.consumed.messages") == 4


@pytest.fixture(scope="module")
def three_brokers(runs_apache: None) -> Iterator[ApacheBroker]:
    """As `own_broker`."""
    with ApacheBroker(3, properties=PROPERTIES.format(session=6000)) as brokers:
        yield brokers


@pytest.fixture
def cluster(three_brokers: ApacheBroker, topic: str) -> Iterator[Clients]:
    made = clients_of(three_brokers, topic)
    yield made
    made.close()


def leaders(clients: Clients) -> dict[str, int]:
    """The port of the leader of each partition, by its number."""
    consumer = clients.consumer()
    metadata = consumer._client.cluster
    return {
        str(each.partition): metadata.broker_metadata(
            metadata.leader_for_partition(each)
        ).port
        for each in partitions_of(consumer, clients.topic)
    }


def peers(recorder: Recorder, topic: str, sent: Any) -> set[tuple[str, int]]:
    """The partitions that messages went to, and the ports of who answered."""
    found = set()
    for span in recorder.named(f"send {topic}"):
        attributes: dict[str, Any] = dict(span.attributes or {})
        if attributes["messaging.kafka.message.key"] in sent:
            partition = attributes["messaging.destination.partition.id"]
            found.add((partition, attributes["network.peer.port"]))
    return found


@two_clients
def test_when_a_leader_is_lost_every_message_arrives_once_and_names_who_took_it(
    instrumented: None,
    three_brokers: ApacheBroker,
    cluster: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    cluster.create_topic(3, replicas=3)
    producer = cluster.producer(**EXACTLY_ONCE)
    consumer = cluster.finite(1)
    sent: dict[str, Any] = {}
    first = send_until_one_arrives(producer, topic, sent)
    read_one(consumer)
    until_all_have_ended(recorder)
    ((partition, leader),) = peers(recorder, topic, [first])
    assert leaders(cluster)[partition] == leader

    sent |= send_each(producer, topic, keys("before"))
    with killed(three_brokers.node_at(leader)):
        sent |= send_each(producer, topic, keys("after"))
        until_all_have_ended(recorder)
        late = send_each(producer, topic, keys("late"))
        until_all_have_ended(recorder)
        sent |= late
        records = held_records(cluster, topic)
        outcomes = assert_the_truth(recorder, topic, sent, records)
        assert outcomes.delivered == sent.keys()
        assert len(records) == len(sent)
        now = leaders(cluster)
        assert now[partition] != leader
        assert peers(recorder, topic, late) == set(now.items())
        assert_goes_on_to_process(consumer, recorder, topic, records)


@two_clients
def test_when_its_coordinator_is_lost_a_group_goes_on_and_commits_to_another(
    instrumented: None,
    three_brokers: ApacheBroker,
    cluster: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    cluster.create_topic(1, replicas=3)
    producer = cluster.producer(**EXACTLY_ONCE)
    member = cluster.consumer(group_id=topic)
    sent: dict[str, Any] = {}
    send_until_one_arrives(producer, topic, sent)
    poll_records(member, 1)
    member.commit()
    coordinator = coordinator_port(recorder.one(f"commit {topic}"))
    errors: list[BaseException] = []
    with killed(three_brokers.node_at(coordinator)):
        send_until_one_arrives(producer, topic, sent)
        deadline = time.monotonic() + DEADLINE
        committed = False
        while not committed:
            assert time.monotonic() < deadline
            # What is not committed may be read again by a member that had to leave.
            last = poll_records(member, 1)[-1]
            try:
                member.commit()
                committed = True
            except kafka.errors.KafkaError as error:
                errors.append(error)
                send_until_one_arrives(producer, topic, sent)
        assert member.committed(TopicPartition(topic, 0)) == last.offset + 1
    _, *failed, done = recorder.named(f"commit {topic}")
    for span, raised in zip(failed, errors, strict=True):
        assert_failed(span, raised, error_types()[type(raised).__name__])
    assert done.status.status_code is StatusCode.UNSET
    assert (done.attributes or {})["messaging.kafka.offset"] == last.offset
    assert coordinator_port(done) != coordinator
    linked = {
        ids(link) for span in recorder.named(f"poll {topic}") for link in span.links
    }
    assert linked == {ids(span) for span in recorder.named(f"send {topic}")}
    assert recorder.open() == []


def coordinator_port(commit: ReadableSpan) -> int:
    port = (commit.attributes or {})["network.peer.port"]
    assert isinstance(port, int)
    return port
