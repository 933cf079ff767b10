"""kafka-python as the tests use it."""

from __future__ import annotations

import selectors
import threading
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from typing import Any

import kafka
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic
from kafka.cluster import ClusterMetadata
from kafka.structs import OffsetAndMetadata

# kafka-python-ng carries the code of kafka-python 2.0.
IS_NG = any(each == "kafka-python-ng" for each in packages_distributions()["kafka"])
VERSION = (
    (2, 0) if IS_NG else tuple(int(part) for part in kafka.__version__.split(".")[:2])
)

# kafka-python 3.0.0 cannot write a message that is larger than its buffer.
sends_large = pytest.mark.skipif(
    kafka.__version__ == "3.0.0", reason="3.0.0 cannot send large messages"
)

# No test waits this long for anything that happens.
DEADLINE = 60.0

# A client that a test has made new asks for a topic that is new. By default it waits
# 100 ms before it asks again, and half of the suite's time was that.
BACKOFF_MS = 10
ClusterMetadata.DEFAULT_CONFIG["retry_backoff_ms"] = BACKOFF_MS
# What kafka-python 3.0.12 misses while it asks, it asks for again only after this.
METADATA_MAX_AGE_MS = 1000
# Up to 2.3, clients give a broker that is slow to answer 2 s, later ones 30 s.
for client in (KafkaProducer, KafkaConsumer, KafkaAdminClient):
    if "api_version_auto_timeout_ms" in client.DEFAULT_CONFIG:
        client.DEFAULT_CONFIG["api_version_auto_timeout_ms"] = 30_000
# kafka-python 2.0 takes 100 ms to find out what it can ask a broker.
ASKS_NOTHING = {"api_version": (2, 5, 0)} if VERSION < (2, 1) else {}


class ForgivingSelector(selectors.DefaultSelector):
    """Lets kafka-python-ng unregister a connection that it has closed.

    -ng closes its bootstrap connections when it has connected to a broker. One that
    was ready in the same moment fails the poll that it happens in.
    """

    def unregister(self, fileobj: Any) -> Any:
        try:
            return super().unregister(fileobj)
        except ValueError:
            return None


FORGIVES = {"selector": ForgivingSelector} if IS_NG else {}


class Finite(KafkaConsumer):  # type: ignore[misc]  # untyped
    """A consumer that stops after `count` records, with no time-out to wait for."""

    count = 0

    def __next__(self) -> Any:
        if self.count == 0:
            raise StopIteration
        self.count -= 1
        return super().__next__()


class Waiting(KafkaConsumer):  # type: ignore[misc]  # untyped
    """Tells when it has begun to wait for records."""

    def __init__(self, *topics: str, **config: Any) -> None:
        self.waits = threading.Event()
        super().__init__(*topics, **config)

    def poll(self, *args: Any, **kwargs: Any) -> Any:
        self.waits.set()
        return super().poll(*args, **kwargs)


class Clients:
    """Makes producers and consumers, and closes them.

    Args:
        address: Of the broker.
        topic: The test's own.
        config: What all of them are given.
    """

    def __init__(self, address: Any, topic: str, **config: Any) -> None:
        self.address = address
        self.topic = topic
        self.config = {
            "bootstrap_servers": address,
            "retry_backoff_ms": BACKOFF_MS,
            "metadata_max_age_ms": METADATA_MAX_AGE_MS,
            **ASKS_NOTHING,
            **FORGIVES,
            **config,
        }
        self._made: list[Any] = []

    def producer(self, cls: type = KafkaProducer, **config: Any) -> Any:
        if VERSION < (2, 2):
            # A new topic's leader may not be ready, and these do not try again.
            config.setdefault("retries", 1000)
        producer = cls(**{**self.config, **config})
        self._made.append(producer)
        return producer

    def consumer(self, *topics: str, cls: type = KafkaConsumer, **config: Any) -> Any:
        """A consumer of all records, which gives up where a test would hang."""
        settings = {
            **self.config,
            "auto_offset_reset": "earliest",
            "consumer_timeout_ms": DEADLINE * 1000,
            "enable_auto_commit": False,
            **config,
        }
        if VERSION[:2] == (2, 1):
            # The close of one that is in a group takes as long.
            settings.setdefault("heartbeat_interval_ms", 300)
        consumer = cls(*(topics or (self.topic,)), **settings)
        self._made.append(consumer)
        return consumer

    def send(self, *values: bytes, **arguments: Any) -> None:
        """Send values, and wait until the broker has them."""
        producer = self.producer()
        for value in values:
            producer.send(self.topic, value, **arguments)
        producer.flush()

    def create_topic(self, partitions: int, replicas: int = 1) -> None:
        """Create the topic with more partitions than one, say."""
        admin = KafkaAdminClient(**self.config)
        admin.create_topics([NewTopic(self.topic, partitions, replicas)])
        admin.close()

    def finite(self, count: int, **config: Any) -> Any:
        """A consumer whose iteration stops after so many records."""
        consumer = self.consumer(cls=Finite, **config)
        consumer.count = count
        return consumer

    def close(self) -> None:
        for client in self._made:
            # A broker that a test has killed answers no goodbyes.
            if isinstance(client, KafkaProducer):
                try:
                    client.close(timeout=1)
                # kafka-python 2.0 wakes its sender through a socket that the sender
                # may just be closing, as an error or no attribute at all.
                except (kafka.errors.KafkaError, OSError, AttributeError):
                    client._closed = True  # it would try again when it is dropped
            else:
                client.close()


def poll(consumer: Any, **arguments: Any) -> Any:
    """Poll until something comes."""
    # At once: kafka-python 3.0.12 may lose the assignment of a join in the middle of
    # which a poll times out.
    polled = consumer.poll(timeout_ms=1000 * DEADLINE, **arguments)
    assert polled, "nothing came"
    return polled


def poll_records(consumer: Any, count: int) -> list[Any]:
    """Poll until so many records have come."""
    records: list[Any] = []
    while len(records) < count:
        for batch in poll(consumer).values():
            records += batch
    return records


def committable(topic: str, offset: int, partition: int = 0) -> dict[Any, Any]:
    """What to commit so that a group goes on with the record at `offset`."""
    more = [-1] if "leader_epoch" in OffsetAndMetadata._fields else []
    return {TopicPartition(topic, partition): OffsetAndMetadata(offset, "", *more)}


def take(consumer: Any, count: int) -> Iterator[Any]:
    """So many records, one by one, without any iteration of the consumer."""
    for _ in range(count):
        yield next(consumer)
