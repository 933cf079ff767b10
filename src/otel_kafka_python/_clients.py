"""The registry of live clients, and the known facts about each."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from otel_kafka_python import _kafka
from otel_kafka_python._kafka import Server
from otel_kafka_python._safety import report


class LastRecord(NamedTuple):
    """The facts about the last record of a partition that a consumer handed over."""

    timestamp: Any  # of the record, as kafka-python has it
    asked: int  # how often the application had asked for records by then


class Client:
    """The known facts about one producer or consumer, which it does not keep alive.

    Args:
        client_id: Its `client_id`, if it has one.
        group: Its consumer group, if it is in one.
        bootstrap: The first of its bootstrap servers, if it has any.
        sends_headers: Whether its broker supports records with headers.
        cluster: Returns its ClusterMetadata of kafka-python, or None.
        is_answered: Whether brokers acknowledge its messages.
        is_extended: Whether its `send` runs application code.
    """

    __slots__ = (
        "__weakref__",
        "_cluster",
        "_refreshed",
        "asked",
        "bootstrap",
        "client_id",
        "group",
        "instance",
        "is_answered",
        "is_extended",
        "last_records",
        "sends_headers",
    )

    def __init__(
        self,
        client_id: str | None = None,
        group: str | None = None,
        bootstrap: Server | None = None,
        *,
        sends_headers: bool = True,
        cluster: Callable[[], Any] = lambda: None,
        is_answered: bool = True,
        is_extended: bool = False,
    ) -> None:
        self.client_id = client_id
        self.group = group
        self.bootstrap = bootstrap
        self.sends_headers = sends_headers
        self.is_answered = is_answered
        self.is_extended = is_extended
        # Returns the producer or consumer, or None.
        self.instance: Callable[[], Any] = lambda: None
        # How often the application asked it for records.
        self.asked = 0
        # The last record of each partition, where its lag in time is observed.
        self.last_records: dict[tuple[str, int], LastRecord] = {}
        self._cluster = cluster
        self._refreshed: object = None

    def refresh(self) -> bool:
        """Drop everything that was derived from older metadata.

        Returns:
            Whether the metadata has been refreshed since the last call.
        """
        refreshed = _kafka.last_refresh(self._cluster())
        if refreshed == self._refreshed:
            return False
        self._refreshed = refreshed
        self.forget()
        return True

    def forget(self) -> None:
        """Drop everything that was derived from the metadata."""

    def remember(self, record: Any) -> None:
        """Remember a record that the application is handed."""
        handed = LastRecord(record.timestamp, self.asked)
        self.last_records[record.topic, record.partition] = handed

    @property
    def cluster_id(self) -> str | None:
        """The cluster's id from its metadata (2.1 and later)."""
        return _kafka.cluster_id(self._cluster())

    def leader(self, topic: str, partition: int | None) -> Server | None:
        """The leader of a partition, if the client's metadata knows it."""
        return _kafka.leader(self._cluster(), topic, partition)


ClientT = TypeVar("ClientT", bound=Client)


class Clients(Generic[ClientT]):
    """The `Client` of each live producer and consumer.

    Args:
        make: The class of the clients.
        on_new: Called when a producer or consumer is first used.
    """

    def __init__(
        self, make: type[ClientT], on_new: Callable[[], object] = lambda: None
    ) -> None:
        self._make = make
        self._on_new = on_new
        # By identity, as long as they live. A WeakKeyDictionary would cost 0.5 µs per
        # message.
        self._known: dict[int, ClientT] = {}

    def living(self) -> list[tuple[Any, ClientT]]:
        """All live producers and consumers, each with its `Client`."""
        # Copied in one step, because other threads may add clients meanwhile.
        found = [(client.instance(), client) for client in list(self._known.values())]
        return [each for each in found if each[0] is not None]

    def get(self, instance: Any) -> ClientT:
        """The `Client`, up to date with its metadata; an empty one if that fails.

        Args:
            instance: A producer, a consumer, or a consumer's coordinator.
        """
        try:
            client = self._known.get(id(instance)) or self._meet(instance)
            if client.refresh():
                client.sends_headers = _kafka.sends_headers(instance)
        except Exception:
            report("read the configuration of a client")
            # Its broker might not support headers.
            return self._make(sends_headers=False)
        return client

    def _meet(self, instance: Any) -> ClientT:
        self._on_new()
        key = id(instance)
        settings = _kafka.settings(instance)
        client = self._make(
            settings.client_id,
            settings.group,
            settings.bootstrap,
            sends_headers=_kafka.sends_headers(instance),
            cluster=settings.cluster,
            is_answered=settings.is_answered,
            is_extended=settings.is_extended,
        )
        # The callback runs before another object can have the same identity.
        client.instance = weakref.ref(instance, lambda _: self._known.pop(key, None))
        self._known[key] = client
        return client
