"""What a span says of the messages that it accounts for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from opentelemetry.trace import Link, SpanContext

from otel_kafka_python._attributes import (
    Attributes,
    add_message,
    header_attributes,
    message_key,
    partition_id,
)
from otel_kafka_python._config import Config
from otel_kafka_python._propagation import creation_context, is_propagated
from otel_kafka_python._semconv import (
    MESSAGING_BATCH_MESSAGE_COUNT,
    MESSAGING_DESTINATION_NAME,
    MESSAGING_DESTINATION_PARTITION_ID,
)

Record = Any
"""A ConsumerRecord. Read by name: its fields differ between versions."""


def shared(partitions: Collection[tuple[str, int]]) -> tuple[str | None, int | None]:
    """The topic and the partition that all are, each None if they are several."""
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

    Of a single message, what belongs to it stands on the span; of two or more,
    on the link to each one's creation context.

    Args:
        config: The settings.
        records: The records, at least one.
        topic: The topic that they share, or None.
        partition: The partition that they share, or None.
        attributes: Those of the span, to which theirs are added.

    Returns:
        The span's links.
    """
    attributes[MESSAGING_BATCH_MESSAGE_COUNT] = len(records)
    if len(records) == 1:
        describe(config, records[0], attributes)
        return links_to(creation_context(records[0].headers))
    links: list[Link] = []
    # Of too many links the SDK keeps the newest: only those are built.
    for record in reversed(records):
        if len(links) >= config.link_limit:
            break
        created = creation_context(record.headers)
        if created is None:
            continue
        about: Attributes = {}
        describe(config, record, about)
        if topic is None:
            about[MESSAGING_DESTINATION_NAME] = record.topic
        if partition is None:
            about[MESSAGING_DESTINATION_PARTITION_ID] = partition_id(record.partition)
        links.append(Link(created, about))
    links.reverse()
    return links


def describe(config: Config, record: Record, attributes: Attributes) -> None:
    """Add what belongs to one message, to a span of one or to a link of a batch."""
    key = message_key(record.key) if config.capture_message_key else None
    size = record.serialized_value_size
    if size != -1 and not config.capture_message_size:
        size = None
    add_message(attributes, record.offset, key, size)
    if config.capture_headers:
        attributes.update(captured_headers(config, record.headers))


def links_to(created: SpanContext | None) -> Sequence[Link]:
    """A link to the creation context of a message, if it has one."""
    return () if created is None else (Link(created),)


def captured_headers(config: Config, headers: Any) -> Attributes:
    """What `capture_headers` asks for; the propagators' own fields never."""
    return header_attributes(
        headers, lambda name: not is_propagated(name) and config.captures(name)
    )
