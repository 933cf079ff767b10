"""The attributes and links that describe a span's messages."""

from __future__ import annotations

from collections.abc import Collection, ItemsView, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, overload, runtime_checkable

from opentelemetry.trace import Link

from otel_kafka_python._attributes import (
    Attributes,
    add_message,
    header_attributes,
    message_key,
    partition_id,
    queue_seconds,
)
from otel_kafka_python._config import Config
from otel_kafka_python._propagation import creation_context, is_propagated
from otel_kafka_python._semconv import (
    KAFKA_RECORD_QUEUE_TIME_MS,
    MESSAGING_BATCH_MESSAGE_COUNT,
    MESSAGING_DESTINATION_NAME,
    MESSAGING_DESTINATION_PARTITION_ID,
    MESSAGING_KAFKA_MESSAGE_KEY,
    MESSAGING_KAFKA_MESSAGE_TOMBSTONE,
    MESSAGING_KAFKA_OFFSET,
    MESSAGING_MESSAGE_BODY_SIZE,
)


@runtime_checkable
class Record(Protocol):
    """The part of a ConsumerRecord that is read; every kafka-python has it."""

    @property
    def topic(self) -> str:
        """The topic's name."""

    @property
    def partition(self) -> int:
        """The number of the partition."""

    @property
    def offset(self) -> int:
        """The offset in the partition."""

    @property
    def timestamp(self) -> int | None:
        """The message's time, in milliseconds since the epoch."""

    @property
    def key(self) -> Any:
        """The key, as the consumer has deserialised it."""

    @property
    def headers(self) -> Sequence[tuple[str, bytes]]:
        """The names and the values of the headers."""

    @property
    def serialized_value_size(self) -> int | None:
        """The size of the value in bytes; -1 for a tombstone."""


def shared_partition(
    partitions: Collection[tuple[str, int]],
) -> tuple[str | None, int | None]:
    """The topic and the partition that all share, each None if there are several."""
    if len(partitions) == 1:
        ((topic, partition),) = partitions
        return topic, partition
    topics = {topic for topic, _ in partitions}
    return topics.pop() if len(topics) == 1 else None, None


def account_for(
    config: Config,
    records: Sequence[Record],
    topic: str | None,
    partition: int | None,
    attributes: Attributes,
) -> Sequence[Link]:
    """Describe the messages that a span of a batch accounts for.

    The attributes of a single message are on the span. With two or more messages, the
    attributes that all of them share are on the span, and those that differ are on the
    links to their creation contexts.

    Args:
        config: The settings.
        records: The records, at least one.
        topic: The topic that they share, or None.
        partition: The partition that they share, or None.
        attributes: The span's attributes, to which theirs are added.

    Returns:
        The span's links.
    """
    attributes[MESSAGING_BATCH_MESSAGE_COUNT] = len(records)
    if len(records) == 1:
        describe(config, records[0], attributes)
        return Links(config, records, topic, partition)
    common = _common(config, records)
    attributes.update(common)
    return Links(config, records, topic, partition, common)


def _common(config: Config, records: Sequence[Record]) -> Attributes:
    """The attributes that all of these messages share."""
    common: Attributes = {}
    first = records[0]
    describe(config, first, common)
    common.pop(MESSAGING_KAFKA_OFFSET, None)
    # Comparing the fields up to the first that differs makes no calls.
    for record in records:
        if record.key != first.key:
            common.pop(MESSAGING_KAFKA_MESSAGE_KEY, None)
            break
    try:
        for record in records:
            if record.serialized_value_size != first.serialized_value_size:
                common.pop(MESSAGING_KAFKA_MESSAGE_TOMBSTONE, None)
                common.pop(MESSAGING_MESSAGE_BODY_SIZE, None)
                break
    except AttributeError:  # a record that a test made up may have no sizes
        common.pop(MESSAGING_KAFKA_MESSAGE_TOMBSTONE, None)
        common.pop(MESSAGING_MESSAGE_BODY_SIZE, None)
    if config.capture_headers:
        names = captured_headers(config, first.headers)
        for record in records:
            found = captured_headers(config, record.headers)
            names = {k: v for k, v in names.items() if found.get(k) == v}
            if not names:
                break
        for name in captured_headers(config, first.headers).keys() - names:
            del common[name]
    return common


class Links(Sequence[Link]):
    """Links to the creation contexts of records, made on first access.

    The links of an unsampled span are usually not accessed: this saves 3 µs per record.

    Args:
        config: The settings.
        records: The records, at least one.
        topic: The topic that they share, or None.
        partition: The partition that they share, or None.
        common: The attributes that are on the span for all of them.
    """

    __slots__ = ("_common", "_config", "_made", "_partition", "_records", "_topic")

    def __init__(
        self,
        config: Config,
        records: Sequence[Record],
        topic: str | None,
        partition: int | None,
        common: Collection[str] = (),
    ) -> None:
        self._config = config
        self._common = common
        self._records = records
        self._topic = topic
        self._partition = partition
        self._made: Sequence[Link] | None = None

    def __bool__(self) -> bool:
        # Only making the links shows whether there are any.
        return True

    def __len__(self) -> int:
        return len(self._links())

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links())

    @overload
    def __getitem__(self, index: int) -> Link: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Link]: ...

    def __getitem__(self, index: int | slice) -> Link | Sequence[Link]:
        return self._links()[index]

    def _links(self) -> Sequence[Link]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> Sequence[Link]:
        if len(self._records) == 1:
            created = creation_context(self._records[0].headers)
            return () if created is None else (Link(created),)
        # All links are made: the SDK counts those above its limit as dropped.
        return [
            Link(created, self._about(record))
            for record in self._records
            if (created := creation_context(record.headers)) is not None
        ]

    def _about(self, record: Record) -> Attributes:
        about: Attributes = {}
        describe(self._config, record, about)
        for name in self._common:
            about.pop(name, None)
        if self._topic is None:
            about[MESSAGING_DESTINATION_NAME] = record.topic
        if self._partition is None:
            about[MESSAGING_DESTINATION_PARTITION_ID] = partition_id(record.partition)
        return about


def describe(
    config: Config, record: Record, attributes: Attributes, started: int | None = None
) -> None:
    """Add the attributes of one message to its span, or to its link of a batch.

    Args:
        config: The settings.
        record: The message.
        attributes: The attributes to add to.
        started: When its processing started, in nanoseconds since the epoch; None if
            it is only received.
    """
    key = message_key(record.key) if config.capture_message_key else None
    try:
        size = record.serialized_value_size
    except AttributeError:  # a record that a test made up may have none
        size = None
    if size != -1 and not (config.capture_message_size and isinstance(size, int)):
        size = None
    add_message(attributes, record.offset, key, size)
    if config.capture_headers:
        attributes.update(captured_headers(config, record.headers))
    if started is not None and config.capture_queue_time:
        seconds = queue_seconds(record.timestamp, started)
        if seconds is not None:
            attributes[KAFKA_RECORD_QUEUE_TIME_MS] = round(seconds * 1e3)


class LazyAttributes(Mapping[str, Any]):
    """The attributes of a process span, built on first access.

    The attributes of an unsampled span are usually not accessed.

    Args:
        config: The settings.
        record: The message.
        known: The attributes of all messages of its topic and partition.
        started: When its processing started, in nanoseconds since the epoch.
    """

    __slots__ = ("_config", "_known", "_made", "_record", "_started")

    def __init__(
        self,
        config: Config,
        record: Record,
        known: MappingProxyType[str, Any],
        started: int,
    ) -> None:
        self._config = config
        self._record = record
        self._known = known
        self._started = started
        self._made: Attributes | None = None

    def __len__(self) -> int:
        return len(self._all())

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __getitem__(self, name: str) -> Any:
        return self._all()[name]

    def __repr__(self) -> str:
        return repr(self._all())

    def items(self) -> ItemsView[str, Any]:
        return self._all().items()

    def copy(self) -> Attributes:
        """Copy them into a dict, as the SDK asks of attributes that it is given."""
        return self._all().copy()

    def _all(self) -> Attributes:
        made = self._made
        if made is None:
            made = self._known.copy()
            describe(self._config, self._record, made, self._started)
            self._made = made
        return made


def captured_headers(config: Config, headers: Any) -> Attributes:
    """The headers that `capture_headers` selects, without the propagators' fields."""
    return header_attributes(
        headers, lambda name: not is_propagated(name) and config.captures(name)
    )
