"""A bad network between the clients and Apache Kafka: the truth, and no trace lost.

Toxiproxy stands between them, and everything goes through it. What a network does to
messages is kafka-python's to mend; that spans and counters say what has become of each
message, and go on when the network does, is ours.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from kafka import TopicPartition
from kafka.errors import KafkaError
from opentelemetry import trace
from opentelemetry.trace import StatusCode

import toxiproxy
from apache_broker import ApacheBroker
from clients import DEADLINE, Clients, Waiting, poll
from deliveries import (
    Outcomes,
    assert_failed,
    assert_the_truth,
    carried,
    held_records,
    ids,
    send_each,
    send_until_one_arrives,
    until_all_have_ended,
)
from pages import error_types
from recorder import Recorder
from toxiproxy import Toxiproxy

pytestmark = pytest.mark.two_clients

ONE_WAY_MS = 300


@pytest.fixture(scope="module")
def proxy(pytestconfig: pytest.Config, runs_apache: None) -> Iterator[Toxiproxy]:
    """A proxy with a broker behind it, which tells its clients of nothing else."""
    missing = toxiproxy.why_unavailable()
    if missing and not pytestconfig.getoption("--broker"):
        pytest.skip(f"the network cannot be made worse: {missing}")
    with Toxiproxy() as started, ApacheBroker(advertised_port=started.port) as broker:
        started.forward(broker.address)
        yield started


@pytest.fixture
def network(proxy: Toxiproxy) -> Iterator[Toxiproxy]:
    """The network, which is a good one before a test and after it."""
    yield proxy
    proxy.heal()


@pytest.fixture
def clients(network: Toxiproxy, topic: str) -> Iterator[Clients]:
    made = Clients(network.address, topic, reconnect_backoff_max_ms=500)
    yield made
    network.heal()
    made.close()


# Ways of the network to be bad, so that nothing is answered.


def cut(network: Toxiproxy) -> None:
    """Connections are closed, and refused."""
    network.cut()


def reset(network: Toxiproxy) -> None:
    """Connections are reset, each as soon as it is used."""
    network.add("reset_peer", "upstream", timeout=0)


def swallow_requests(network: Toxiproxy) -> None:
    """Connections stay open, and no request arrives."""
    network.add("timeout", "upstream", timeout=0)


def swallow_answers(network: Toxiproxy) -> None:
    """Connections stay open, requests arrive, and no answer does."""
    network.add("timeout", "downstream", timeout=0)


Way = Callable[[Toxiproxy], None]
WAYS = [cut, reset, swallow_requests, swallow_answers]
HALF_OPEN = [swallow_requests, swallow_answers]


def send_some(producer: Any, topic: str, first: int, count: int) -> dict[str, Any]:
    """Send messages whose keys are numbers; what `send_each` gives."""
    return send_each(producer, topic, map(str, range(first, first + count)))


def send_first(producer: Any, topic: str, count: int = 10) -> dict[str, Any]:
    """Send messages while the network is good, and have the producer know the topic."""
    sent = send_some(producer, topic, 0, count)
    producer.flush()
    return sent


def outcomes_of(
    sent: Mapping[str, Any], clients: Clients, recorder: Recorder, records: list[Any]
) -> Outcomes:
    """What became of messages, once the broker's `records` have been processed, too.

    Each is in the trace of its send span, in a loop as after any other.
    """
    topic = clients.topic
    outcomes = assert_the_truth(recorder, topic, sent, records)
    positions = [(record.partition, record.offset) for record in records]
    handled = []
    for record in clients.finite(len(records)):
        current: Any = trace.get_current_span()
        (link,) = current.links
        assert current.parent == link.context
        assert ids(link) == carried(record)
        handled.append((record.partition, record.offset))
    assert handled == positions
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert len(recorder.named(f"process {topic}")) == len(records)
    assert recorder.open() == []
    return outcomes


def test_latency_is_in_the_spans_and_not_in_the_calls(
    instrumented: None,
    network: Toxiproxy,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    producer = clients.producer()
    sent = send_first(producer, topic)
    member = clients.consumer(group_id=topic)
    poll(member)
    for stream in "upstream", "downstream":
        network.add("latency", stream, latency=ONE_WAY_MS)
    started = time.monotonic()
    sent |= send_some(producer, topic, 10, 100)
    # If each call waited for the network, it would be thirty seconds.
    assert time.monotonic() - started < 15
    until_all_have_ended(recorder)
    member.commit()
    network.heal()
    late = recorder.named(f"send {topic}")[10:]
    for span in *late, recorder.one(f"commit {topic}"):
        assert span.start_time is not None
        assert span.end_time is not None
        # A little less, because clocks differ.
        assert span.end_time - span.start_time > 2 * (ONE_WAY_MS - 1) * 1_000_000
    outcomes = outcomes_of(sent, clients, recorder, held_records(clients, topic))
    assert outcomes.delivered == sent.keys()


@pytest.mark.parametrize("idempotent", [False, True])
@pytest.mark.parametrize("way", [cut, reset])
def test_what_is_in_flight_when_connections_end_is_sent_in_the_end(
    instrumented: None,
    network: Toxiproxy,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    way: Way,
    idempotent: bool,
) -> None:
    producer = clients.producer(enable_idempotence=idempotent)
    sent = send_first(producer, topic)
    swallow_answers(network)
    in_flight = send_some(producer, topic, 10, 2000)
    way(network)
    in_flight |= send_some(producer, topic, 2010, 500)
    assert not any(future.is_done for future in in_flight.values())
    network.heal()
    until_all_have_ended(recorder)
    sent |= in_flight
    # A producer that is not idempotent has some of them written twice.
    outcomes = outcomes_of(sent, clients, recorder, held_records(clients, topic))
    assert outcomes.delivered == sent.keys()


@pytest.mark.parametrize("way", HALF_OPEN)
def test_what_is_answered_within_the_delivery_time_out_is_sent(
    instrumented: None,
    network: Toxiproxy,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    way: Way,
) -> None:
    producer = clients.producer(request_timeout_ms=1000)
    sent = send_first(producer, topic)
    way(network)
    sent |= send_some(producer, topic, 10, 500)
    deadline = time.monotonic() + DEADLINE
    while not producer.metrics()["producer-metrics"]["record-retry-rate"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    network.heal()
    until_all_have_ended(recorder)
    outcomes = outcomes_of(sent, clients, recorder, held_records(clients, topic))
    assert outcomes.delivered == sent.keys()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_answered_in_time_fails_until_the_network_is_healed(
    instrumented: None,
    network: Toxiproxy,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    way: Way,
) -> None:
    producer = clients.producer(
        # An idempotent one, in kafka-python 3.0, leaves all futures after the first
        # failure as they are.
        enable_idempotence=False,
        request_timeout_ms=1000,
        delivery_timeout_ms=2000,
    )
    sent = send_first(producer, topic)
    way(network)
    lost = send_some(producer, topic, 10, 500)
    until_all_have_ended(recorder)
    network.heal()
    sent |= lost
    last = send_until_one_arrives(producer, topic, sent)
    until_all_have_ended(recorder)
    records = held_records(clients, topic)
    outcomes = outcomes_of(sent, clients, recorder, records)
    assert lost.keys() <= outcomes.failed.keys()
    assert last in outcomes.delivered
    # What has failed is there all the same if it is the answer that was lost.
    written = lost.keys() & {record.key.decode() for record in records}
    assert bool(written) == (way is swallow_answers)


@pytest.mark.parametrize("way", WAYS)
def test_a_send_that_cannot_learn_of_its_topic_raises_until_the_network_is_healed(
    instrumented: None,
    network: Toxiproxy,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    way: Way,
) -> None:
    producer = clients.producer(max_block_ms=500)
    way(network)
    refused = send_some(producer, topic, 0, 1)
    network.heal()
    sent = dict(refused)
    last = send_until_one_arrives(producer, topic, sent)
    until_all_have_ended(recorder)
    outcomes = outcomes_of(sent, clients, recorder, held_records(clients, topic))
    assert refused.keys() <= outcomes.raised.keys()
    assert outcomes.delivered == {last}


def narrow(network: Toxiproxy) -> None:
    """Have requests pass slowly, in KB/s."""
    network.add("bandwidth", "upstream", rate=50)


def slice_up(network: Toxiproxy, stream: str = "upstream") -> None:
    """Have them pass in pieces smaller than a message, in bytes, with µs between."""
    network.add("slicer", stream, average_size=50, size_variation=25, delay=1000)


@pytest.mark.parametrize("way", [narrow, slice_up])
def test_what_is_sent_in_a_trickle_arrives(
    instrumented: None,
    network: Toxiproxy,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    way: Way,
) -> None:
    producer = clients.producer()
    sent = send_first(producer, topic)
    way(network)
    started = time.monotonic()
    sent |= send_some(producer, topic, 10, 500)
    until_all_have_ended(recorder)
    assert time.monotonic() - started > 0.5  # it was a trickle
    outcomes = outcomes_of(sent, clients, recorder, held_records(clients, topic))
    assert outcomes.delivered == sent.keys()


def test_what_trickles_into_a_loop_is_processed_as_ever(
    instrumented: None,
    network: Toxiproxy,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    sent = send_first(clients.producer(), topic, 500)
    records = held_records(clients, topic)
    slice_up(network, "downstream")
    outcomes = outcomes_of(sent, clients, recorder, records)
    assert outcomes.delivered == sent.keys()


def test_what_trickles_into_polls_is_received_as_ever(
    instrumented: None,
    network: Toxiproxy,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    send_first(clients.producer(), topic, 500)
    records = held_records(clients, topic)
    consumer = clients.consumer(max_poll_records=100)
    slice_up(network, "downstream")
    batches: list[list[Any]] = []
    while sum(map(len, batches)) < len(records):
        batches += poll(consumer).values()
    spans = recorder.named(f"poll {topic}")
    for span, batch in zip(spans, batches, strict=True):
        linked = [ids(link) for link in span.links]
        assert linked == [carried(record) for record in batch]
    received = [record.offset for batch in batches for record in batch]
    assert received == [record.offset for record in records]
    assert recorder.count("messaging.client.consumed.messages") == len(records)


@pytest.mark.parametrize("group", [None, "group"])
@pytest.mark.parametrize("way", WAYS)
def test_a_loop_that_is_cut_off_goes_on_when_the_network_is_healed(
    instrumented: None,
    network: Toxiproxy,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    way: Way,
    group: str | None,
) -> None:
    producer = clients.producer()
    send_first(producer, topic, 5)
    consumer = clients.consumer(cls=Waiting, group_id=group and topic)

    def heal() -> None:
        assert consumer.waits.wait(DEADLINE)
        network.heal()
        for number in range(5, 10):
            send_some(producer, topic, number, 1)

    healing = threading.Thread(target=heal)
    handled = []
    for record in consumer:
        current: Any = trace.get_current_span()
        assert current.attributes["messaging.kafka.offset"] == record.offset
        handled.append(record.offset)
        if record.offset == 4 and healing.ident is None:
            way(network)
            consumer.waits.clear()
            healing.start()
        elif record.offset == 9:
            break
    assert trace.get_current_span() is trace.INVALID_SPAN
    healing.join(DEADLINE)
    until_all_have_ended(recorder)
    spans = recorder.named(f"process {topic}")
    assert [(s.attributes or {})["messaging.kafka.offset"] for s in spans] == handled
    assert set(handled) == set(range(10))
    assert set(recorder.names()) == {f"send {topic}", f"process {topic}"}
    assert recorder.count("messaging.client.consumed.messages") == len(handled)


@pytest.mark.parametrize("way", WAYS)
def test_a_poll_that_is_cut_off_brings_nothing_and_a_commit_fails_until_it_is_healed(
    instrumented: None,
    network: Toxiproxy,
    clients: Clients,
    recorder: Recorder,
    topic: str,
    way: Way,
) -> None:
    send_first(clients.producer(), topic)
    member = clients.consumer(group_id=topic)
    poll(member)
    way(network)
    assert member.poll(timeout_ms=500) == {}
    with pytest.raises(KafkaError) as raised:
        member.commit(timeout_ms=500)
    network.heal()
    member.commit()
    # The broker may have committed at once if it is the answer that was lost.
    assert member.committed(TopicPartition(topic, 0)) == 10
    failed, committed = recorder.named(f"commit {topic}")
    assert_failed(failed, raised.value, error_types()[type(raised.value).__name__])
    assert committed.status.status_code is StatusCode.UNSET
    assert len(recorder.one(f"poll {topic}").links) == 10
    assert recorder.named("poll") == []
    assert recorder.open() == []
