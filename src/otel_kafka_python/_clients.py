"""The registry of live clients, and the state kept for each."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, NamedTuple

from otel_kafka_python import _endings, _kafka
from otel_kafka_python._attributes import Attributes
from otel_kafka_python._clock import Moment
from otel_kafka_python._kafka import ClientConfig, Server
from otel_kafka_python._operation import Kind, OperationTemplate, Receipt
from otel_kafka_python._pipeline import Handover
from otel_kafka_python._safety import report

_UNKNOWN = ClientConfig()


class LastRecord(NamedTuple):
    """The facts about the last record of a partition that a consumer handed over."""

    timestamp: Any  # of the record, as kafka-python has it
    asked: int  # how often the application had asked for records by then


class Step(Enum):
    """Why a consumer's `__next__` runs; the `poll` that it calls is part of it."""

    NEXT = auto()  # an operation of its own
    ITERATION = auto()  # one step of a loop
    FAILED = auto()  # one step of a loop whose `poll` failed and has been traced


class Client:
    """The state kept for a producer or consumer; it does not keep the client alive.

    Args:
        config: The part of its configuration that is used.
        sends_headers: Whether its broker supports records with headers.
    """

    __slots__ = (
        "__weakref__",
        "_cluster",
        "_refreshed",
        "answer_attributes",
        "asked",
        "bootstrap",
        "client_id",
        "group",
        "handovers",
        "instance",
        "is_acknowledged",
        "last_records",
        "met_in",
        "polled",
        "receipt",
        "runs_application_code",
        "sends_headers",
        "step",
        "templates",
    )

    def __init__(
        self, config: ClientConfig = _UNKNOWN, *, sends_headers: bool = True
    ) -> None:
        self.client_id = config.client_id
        self.group = config.group
        self.bootstrap = config.bootstrap
        self.is_acknowledged = config.is_acknowledged
        self.runs_application_code = config.runs_application_code
        self.sends_headers = sends_headers
        # A client does not work in another process, for example in a forked child.
        self.met_in = _endings.this_process
        # Returns the producer or consumer, or None.
        self.instance: Callable[[], Any] = lambda: None
        self._cluster = config.cluster
        self._refreshed: object = None
        # Derived from the metadata.
        self.templates: dict[tuple[Kind, Any, Any], OperationTemplate | None] = {}
        # The attributes of messages that a partition's leader answered.
        self.answer_attributes: dict[tuple[str | None, int, bool], Attributes] = {}
        # How often the application asked it for records.
        self.asked = 0
        # The last record of each partition, where its lag in time is observed.
        self.last_records: dict[tuple[str, int], LastRecord] = {}
        self.step: Step | None = None
        # When the poll in that step started and ended, if it brought records.
        self.polled: tuple[Moment, int] | None = None
        # The receipt of the last record, as long as the hook has not been called.
        self.receipt: Receipt | None = None
        # The last records that were handed over, if the latency of pipelines is
        # measured.
        self.handovers: list[Handover] = []

    def refresh(self) -> bool:
        """Forget everything that was derived from older metadata.

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
        """Forget everything that was derived from the metadata."""
        self.templates, self.answer_attributes = {}, {}

    def remember(self, record: Any) -> None:
        """Remember a record that the application is handed."""
        handed = LastRecord(record.timestamp, self.asked)
        self.last_records[record.topic, record.partition] = handed

    def close_receipt(self) -> None:
        """Close the receipt of the last record, if it is still open."""
        receipt, self.receipt = self.receipt, None
        if receipt is not None:
            receipt.close()

    @property
    def cluster_id(self) -> str | None:
        """The cluster's id from its metadata (2.1 and later)."""
        return _kafka.cluster_id(self._cluster())

    def leader(self, topic: str, partition: int | None) -> Server | None:
        """The leader of a partition, if the client's metadata knows it."""
        return _kafka.leader(self._cluster(), topic, partition)


class Clients:
    """The `Client` of each live producer and consumer.

    Args:
        on_new: Called when a producer or consumer is first used.
    """

    def __init__(self, on_new: Callable[[], object]) -> None:
        self._on_new = on_new
        # By identity, as long as they live. A WeakKeyDictionary would cost 0.5 µs per
        # message.
        self._known: dict[int, Client] = {}

    def living(self) -> list[tuple[Any, Client]]:
        """The live producers and consumers of this process, each with its `Client`."""
        # Copied in one step, because other threads may add clients meanwhile.
        found = [
            (client.instance(), client)
            for client in list(self._known.values())
            if client.met_in is _endings.this_process
        ]
        return [each for each in found if each[0] is not None]

    def get(self, instance: Any) -> Client:
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
            return Client(sends_headers=False)
        return client

    def _meet(self, instance: Any) -> Client:
        self._on_new()
        key = id(instance)
        client = Client(
            _kafka.client_config(instance), sends_headers=_kafka.sends_headers(instance)
        )
        # The callback runs before another object can have the same identity.
        client.instance = weakref.ref(instance, lambda _: self._known.pop(key, None))
        self._known[key] = client
        return client
