"""kafka-python's own metrics, and the lag of consumers."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from embedded_broker import EmbeddedBroker
from kafka import TopicPartition
from opentelemetry.sdk.metrics import Meter, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, NumberDataPoint

from apache_broker import described_lags
from clients import DEADLINE, VERSION, Clients, poll, poll_records
from collector import collect
from conftest import Instrument
from otel_kafka_python import KafkaPythonInstrumentor, _client_metrics, _kafka
from otel_kafka_python._client_metrics import NAMES
from recorder import Log, Recorder
from scripts import forks, needs_fork

JAVA: dict[str, Any] = json.loads(
    (Path(__file__).parent / "java-agent-metrics.json").read_text()
)["metrics"]
OURS = {
    f"kafka.{kind}.{name.replace('-', '_')}"
    for kind, names in NAMES.items()
    for name in names
}
# What kafka-python has and the Java client has not.
KAFKA_PYTHONS_OWN = {
    "kafka.consumer.heartbeat_response_time_max",
    "kafka.consumer.throttle_time_avg",
    "kafka.consumer.throttle_time_max",
    "kafka.producer.throttle_time_avg",
    "kafka.producer.throttle_time_max",
}
# Worked out here.
OUR_OWN = {"kafka.consumer.time_lag"}
# The agent has no group, but lag is a group's, and all clients share a default id.
ONLY_OURS = "messaging.consumer.group.name"
# The Java client has it for each partition, kafka-python for the whole consumer; and
# the average over topics, which kafka-python keeps apart from that of each.
WITH_FEWER_TAGS = {"kafka.consumer.records_lag_max"}


def seen(recorder: Recorder) -> dict[str, list[dict[str, Any]]]:
    """The attributes of what is exported of kafka-python's own metrics, by name."""
    return {
        metric.name: [dict(point.attributes or {}) for point in metric.data.data_points]
        for metric in recorder.metrics()
        if metric.name in OURS
    }


def lags(recorder: Recorder) -> dict[tuple[str, str], int]:
    return {
        (point.attributes["topic"], point.attributes["partition"]): point.value
        for point in recorder.points("kafka.consumer.records_lag")
    }


def time_lags(recorder: Recorder) -> dict[str, float]:
    """The lag in seconds by partition."""
    return {
        point.attributes["partition"]: point.value
        for point in recorder.points("kafka.consumer.time_lag")
    }


def send_aged(clients: Clients, *ages: float) -> list[float]:
    """Send records that were written so many seconds ago; when that was."""
    written = [time.time() - age for age in ages]
    producer = clients.producer()
    for each in written:
        producer.send(clients.topic, b"value", timestamp_ms=round(each * 1000))
    producer.flush()
    return written


def work(clients: Clients) -> tuple[Any, Any]:
    """A producer and a consumer that have sent and been given something."""
    producer = clients.producer(client_id="shop")
    for number in range(10):
        producer.send(clients.topic, b"%d" % number).get(DEADLINE)
    consumer = clients.consumer(client_id="shipping", group_id=clients.topic)
    poll_records(consumer, 10)
    consumer.commit()
    return producer, consumer


def test_they_are_exported_on_request_only(
    instrumented: None, clients: Clients, recorder: Recorder
) -> None:
    work(clients)
    assert seen(recorder) == {}


def test_they_have_the_java_agents_names_types_and_attributes(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(client_metrics=True)
    clients.topic = f"{topic}.with.dots"
    clients_alive = work(clients)
    exported = seen(recorder)
    assert OURS - set(JAVA) == KAFKA_PYTHONS_OWN | OUR_OWN
    for name, points in exported.items():
        facts = JAVA.get(name)
        if facts is None:
            continue
        # And so are they: the recorder holds all of ours against that.
        assert facts["type"] == "gauge"
        expected = set(facts["attributes"])
        if "consumer" in name:
            expected.add(ONLY_OURS)
        if VERSION < (2, 1):
            expected.discard("messaging.kafka.cluster.id")
        for point in points:
            assert set(point) <= expected, name
            assert point["client-id"] == ("shop" if "producer" in name else "shipping")
            if "topic" in point:
                assert point["topic"] == clients.topic
            if name not in WITH_FEWER_TAGS:
                assert set(point) == expected, name
    # Each kind is there: of the client, of a topic, of a partition, of a node.
    assert {
        "kafka.producer.record_size_avg",
        "kafka.producer.record_send_rate",
        "kafka.producer.request_latency_avg",
        "kafka.consumer.records_consumed_rate",
        "kafka.consumer.records_lag",
        "kafka.consumer.records_lag_max",
        "kafka.consumer.commit_latency_avg",
        "kafka.consumer.fetch_rate",
    } <= set(exported)
    del clients_alive


def test_none_that_kafka_python_keeps_is_left_out(clients: Clients) -> None:
    for kind, client in zip(("producer", "consumer"), work(clients), strict=True):
        kept = {
            metric.name
            for metric in client.metrics(raw=True)
            if metric.group != "kafka-metrics-count"  # of how many metrics there are
        }
        assert kept
        assert kept <= set(NAMES[kind])


def test_the_values_are_the_clients_own(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(client_metrics=True)
    producer, consumer = work(clients)
    (size,) = recorder.points("kafka.producer.record_size_max")
    assert size.value == producer.metrics()["producer-metrics"]["record-size-max"]
    (assigned,) = recorder.points("kafka.consumer.assigned_partitions")
    assert assigned.value == len(consumer.assignment()) == 1
    # In milliseconds, as the Java client has it.
    (waited,) = recorder.points("kafka.producer.record_queue_time_max")
    kept = producer.metrics()["producer-metrics"]["record-queue-time-max"]
    assert waited.value == pytest.approx(kept * 1000)
    for metric in recorder.metrics():
        if metric.name in OURS:
            for point in metric.data.data_points:
                assert isinstance(point, NumberDataPoint)
                assert math.isfinite(point.value)


@forks
@needs_fork
@pytest.mark.one_broker
def test_a_forked_child_does_not_export_those_of_its_parents_clients(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(client_metrics=True)
    clients_alive = work(clients)
    child = os.fork()
    if child == 0:
        signal.alarm(int(DEADLINE))  # the parent's threads may have held locks
        os._exit(len(seen(recorder)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert seen(recorder)
    del clients_alive


def test_the_lag_of_each_partition_is_what_the_consumer_has_not_been_given(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(client_metrics=True)
    clients.create_topic(2)
    producer = clients.producer()
    for partition, count in ((0, 30), (1, 7)):
        for _ in range(count):
            producer.send(topic, b"value", partition=partition)
    producer.flush()
    consumer = clients.consumer()
    given = {"0": 0, "1": 0}
    # It is held back on purpose: it is given a few records at a time.
    while sum(given.values()) < 37:
        for partition, records in poll(consumer, max_records=4).items():
            given[str(partition.partition)] += len(records)
        for (_, number), lag in lags(recorder).items():
            assert lag == {"0": 30, "1": 7}[number] - given[number]
    assert lags(recorder) == {(topic, "0"): 0, (topic, "1"): 0}


def test_a_partition_that_nothing_was_fetched_of_has_no_lag(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(client_metrics=True)
    clients.send(b"value")
    consumer = clients.consumer()
    poll(consumer)
    assert lags(recorder) == {(topic, "0"): 0}
    consumer.unsubscribe()
    consumer.assign([TopicPartition(topic, 0)])
    assert lags(recorder) == {}


def by_poll(consumer: Any) -> Iterator[Any]:
    for _ in range(consumer.count):
        ((record,),) = poll(consumer, max_records=1).values()
        yield record
    assert consumer.poll(timeout_ms=0) == {}


def by_next(consumer: Any) -> Iterator[Any]:
    for _ in range(consumer.count):
        yield next(consumer)
    consumer.count = consumer.config["consumer_timeout_ms"] = 1
    with pytest.raises(StopIteration):
        next(consumer)


@pytest.mark.parametrize("hand_over", [by_poll, by_next, iter])
@pytest.mark.parametrize("more", [{}, {"metrics": False}, {"pipeline_latency": True}])
def test_the_time_lag_is_the_age_of_the_last_record_until_more_is_asked_for(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    hand_over: Callable[[Any], Iterator[Any]],
    more: dict[str, bool],
) -> None:
    instrument(client_metrics=True, **more)
    written = send_aged(clients, 300, 200, 100)
    seen = []
    # It is slowed down on purpose: nothing more is asked for before it is observed.
    consumer = clients.finite(3)
    for _ in hand_over(consumer):
        earliest = time.time()
        (lag,) = time_lags(recorder).values()
        seen.append((earliest, lag, time.time()))
    for at, (earliest, lag, latest) in zip(written, seen, strict=True):
        assert earliest - at <= lag + 0.001 <= latest - at + 0.002
    assert time_lags(recorder) == {"0": 0}


def test_the_time_lag_grows_while_a_consumer_is_stuck_and_is_0_with_nothing_behind(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(client_metrics=True)
    clients.create_topic(2)
    producer = clients.producer()
    producer.send(clients.topic, b"value", partition=1).get(DEADLINE)
    consumer = clients.consumer(group_id=clients.topic)
    poll_records(consumer, 1)
    consumer.poll(timeout_ms=0)
    assert time_lags(recorder)["1"] == 0
    for _ in range(3):
        producer.send(clients.topic, b"value", partition=0)
    producer.flush()
    poll(consumer, max_records=1)
    # It is stopped here, with records to come, and observed again and again.
    stuck = [time_lags(recorder) for _ in range(5)]
    grown = [each["0"] for each in stuck]
    assert all(before < after for before, after in pairwise(grown))
    # The other partition is up to date all the same.
    assert {each["1"] for each in stuck} == {0}
    poll_records(consumer, 2)
    assert time_lags(recorder)["0"] > 0  # nobody knows what becomes of the last ones
    consumer.poll(timeout_ms=0)
    assert time_lags(recorder) == {"0": 0, "1": 0}


def test_records_of_before_the_first_have_no_time_lag(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(client_metrics=True)
    clients.send(b"not an int")
    consumer = clients.consumer(value_deserializer=int)
    with pytest.raises(Exception, match="not an int"):
        poll(consumer)
    assert lags(recorder) == {(clients.topic, "0"): 1}
    assert time_lags(recorder) == {}


@pytest.mark.parametrize(("age", "lag"), [(-1000, 0), (None, None)])
def test_a_time_lag_is_never_negative_and_absent_without_a_timestamp(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    age: float | None,
    lag: float | None,
) -> None:
    instrument(client_metrics=True)
    if age is None:
        clients.send(b"value", timestamp_ms=-1)
    else:
        send_aged(clients, age)
    ((record,),) = poll(clients.consumer()).values()
    assert (record.timestamp < 0) == (age is None)
    assert time_lags(recorder).get("0") == lag


def test_a_consumers_metrics_have_its_group(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(client_metrics=True)
    kept = work(clients)
    alone = clients.consumer(client_id="alone")
    poll_records(alone, 10)
    groups: dict[str, set[str | None]] = {}
    for points in seen(recorder).values():
        for point in points:
            group = point.get("messaging.consumer.group.name")
            groups.setdefault(point["client-id"], set()).add(group)
    assert groups == {"shop": {None}, "shipping": {clients.topic}, "alone": {None}}
    del kept


@pytest.mark.one_client
def test_the_lag_of_a_group_is_what_kafkas_own_tool_says(
    broker: Any,
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    topic: str,
) -> None:
    if isinstance(broker, EmbeddedBroker):
        pytest.skip("the embedded broker describes no groups")
    instrument(client_metrics=True)
    clients.create_topic(2)
    producer = clients.producer()
    for partition in (0, 0, 0, 1, 1):
        producer.send(topic, b"value", partition=partition)
    producer.flush()
    consumer = clients.consumer(group_id=topic)
    given: list[Any] = []
    # What a partition has is known from the first record of it on.
    while len(set(given)) < 2:
        given += poll(consumer, max_records=1)
    consumer.commit()
    behind = described_lags(clients.address, topic)
    assert sum(behind.values()) == 5 - len(given) > 0
    assert lags(recorder) == behind
    poll_records(consumer, 5 - len(given))
    consumer.poll(timeout_ms=0)
    consumer.commit()
    assert lags(recorder) == described_lags(clients.address, topic)
    assert time_lags(recorder) == {"0": 0, "1": 0}


def test_the_assignment_is_read_once_however_many_topics_there_are(
    clients: Clients, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topics = [f"{topic}.{number}" for number in range(5)]
    producer = clients.producer()
    for each in topics:
        producer.send(each, b"value").get(DEADLINE)
    consumer = clients.consumer(*topics)
    poll_records(consumer, len(topics))
    reads: list[Any] = []

    def assigned(consumer: Any) -> Any:
        reads.append(consumer)
        return consumer._subscription.assignment

    monkeypatch.setattr(_kafka, "_assigned", assigned)
    metrics = _kafka.client_metrics(consumer, "consumer", "bytes-consumed-rate")
    tags = {metric.tags["topic"] for metric in metrics if metric.tags}
    assert tags == set(topics)
    assert len(reads) == 1


def test_the_lag_in_a_loop_is_what_comes_after_the_record(
    instrument: Instrument, clients: Clients, recorder: Recorder, topic: str
) -> None:
    instrument(client_metrics=True)
    clients.send(*(b"value",) * 5)
    consumer = clients.consumer()
    seen = []
    for record in consumer:
        seen.append(lags(recorder)[topic, "0"])
        if record.offset == 4:
            break
    assert seen == [4, 3, 2, 1, 0]


def test_reading_them_asks_the_broker_for_nothing(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instrument(client_metrics=True)
    producer, consumer = work(clients)
    client = type(consumer._client)

    def send(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a request")

    producer.close()
    monkeypatch.setattr(client, "send", send)
    monkeypatch.setattr(type(consumer), "position", send)
    assert lags(recorder)
    monkeypatch.undo()


def test_clients_that_are_gone_are_not_observed(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(client_metrics=True)
    kept, dropped = (clients.producer(client_id=name) for name in ("kept", "dropped"))
    for producer in (kept, dropped):
        producer.send(clients.topic, b"value").get(DEADLINE)

    def observed() -> set[str]:
        points = recorder.points("kafka.producer.record_size_max")
        return {point.attributes["client-id"] for point in points}

    assert observed() == {"kept", "dropped"}
    KafkaPythonInstrumentor().uninstrument()
    assert observed() == set()
    # And again, through the same instruments, which take no second callback.
    instrument(client_metrics=True)
    kept.send(clients.topic, b"value").get(DEADLINE)
    assert observed() == {"kept"}
    assert recorder.count("messaging.client.sent.messages") == 3


def test_a_closed_client_is_not_observed_though_it_is_kept(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(client_metrics=True)
    producer, consumer = work(clients)
    assert lags(recorder)
    consumer.close()
    producer.close()
    assert seen(recorder) == {}


def test_uninstrumented_no_client_is_observed(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(client_metrics=True)
    kept = work(clients)
    assert seen(recorder)
    KafkaPythonInstrumentor().uninstrument()
    assert seen(recorder) == {}
    del kept


@pytest.mark.cpython
def test_a_provider_is_let_go_with_the_instrumentation(
    instrument: Instrument, clients: Clients
) -> None:
    provider = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    dropped = weakref.ref(provider)
    instrument(client_metrics=True, meter_provider=provider)
    clients.send(b"value")
    KafkaPythonInstrumentor().uninstrument()
    provider.shutdown()
    del provider
    collect()
    assert dropped() is None


def test_a_client_whose_metrics_cannot_be_read_is_logged_once_and_left_out(
    instrument: Instrument, clients: Clients, recorder: Recorder, log: Log
) -> None:
    instrument(client_metrics=True)
    producer, consumer = work(clients)

    def metrics(raw: bool = False) -> Any:
        raise RuntimeError("from metrics")

    producer.metrics = metrics
    assert seen(recorder)["kafka.consumer.fetch_rate"]
    assert "kafka.producer.record_size_max" not in seen(recorder)
    (message,) = log.take()
    assert message.startswith("Failed to read the metrics of a client")
    assert consumer.assignment() == {TopicPartition(clients.topic, 0)}


def test_a_metric_that_is_no_number_is_left_out(
    instrument: Instrument, clients: Clients, recorder: Recorder
) -> None:
    instrument(client_metrics=True)
    producer, _ = work(clients)

    class Name:
        name, group = "record-size-max", "producer-metrics"
        tags = MappingProxyType({"client-id": "shop"})

    text = SimpleNamespace(value=lambda: "large")
    producer.metrics = lambda raw: {Name(): text}
    assert "kafka.producer.record_size_max" not in seen(recorder)


@pytest.mark.parametrize("call", ["create_observable_gauge", "Observation"])
def test_an_sdk_that_fails_to_observe_is_logged_once_and_harms_nothing_else(
    instrument: Instrument,
    clients: Clients,
    recorder: Recorder,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("from an SDK")

    owner: Any = Meter if call == "create_observable_gauge" else _client_metrics
    monkeypatch.setattr(owner, call, fail)
    instrument(client_metrics=True)
    work(clients)
    assert seen(recorder) == {}
    assert recorder.count("messaging.client.sent.messages") == 10
    (message,) = log.take()
    assert "the metrics of" in message


def test_the_documentation_has_all_of_them() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    section = page.split("\n## Client metrics\n")[1].split("\n## ")[0]
    documented: dict[str, set[str]] = {}
    for kind, origin, names in re.findall(
        r"^\| `kafka\.(\w+)\.` \| (.*) \| (.*) \|$", section, re.MULTILINE
    ):
        for name in re.findall(r"`(\w+)`", names):
            documented.setdefault(f"kafka.{kind}.{name}", set()).add(origin)
    assert set(documented) == OURS
    for origin, own in ("kafka-python", KAFKA_PYTHONS_OWN), ("this package", OUR_OWN):
        assert {name for name, by in documented.items() if by == {origin}} == own
