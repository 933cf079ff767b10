"""What a span says of the messages that it accounts for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext

from otel_kafka_python._attributes import (
    Attributes,
    body_size,
    header_attributes,
    message_attributes,
    message_key,
    partition_id,
)
from otel_kafka_python._config import Config
from otel_kafka_python._propagation import (
    creation_context,
    extract,
    is_propagated,
)
from otel_kafka_python._safety import report
from otel_kafka_python._semconv import (
    MESSAGING_BATCH_MESSAGE_COUNT,
    MESSAGING_DESTINATION_NAME,
    MESSAGING_DESTINATION_PARTITION_ID,
)

Record = Any
"""A ConsumerRecord. Read by name: its fields differ between versions."""


class Account(NamedTuple):
    """What a receive or process span says of its messages (Consumer spans)."""

    attributes: Attributes
    links: list[Link]
    # What the headers of a single message carried; of a batch nothing.
    context: Context


def shared_topic(records: Sequence[Record]) -> str | None:
    """The topic of all records, or None if they are of several."""
    if len(records) == 1:
        return records[0].topic  # type: ignore[no-any-return]  # untyped
    topics = {record.topic for record in records}
    return topics.pop() if len(topics) == 1 else None


def shared_partition(records: Sequence[Record]) -> int | None:
    """The partition of all records, or None if they are of several."""
    if len(records) == 1:
        return records[0].partition  # type: ignore[no-any-return]  # untyped
    partitions = {(record.topic, record.partition) for record in records}
    return partitions.pop()[1] if len(partitions) == 1 else None


def account_for(config: Config, records: Sequence[Record], *, batch: bool) -> Account:
    """Describe the messages that one span accounts for.

    Of a single message, what belongs to it stands on the span; of two or more,
    on the link to each one's creation context.

    Args:
        config: The settings.
        records: The records, at least one.
        batch: Whether the operation is one on batches, even of one message.
    """
    if len(records) == 1:
        attributes = _attributes_of(config, records[0])
        context = _extract(records[0])
        created = creation_context(context) if context else None
        links = [Link(created)] if created else []
        if batch:
            attributes[MESSAGING_BATCH_MESSAGE_COUNT] = 1
            context = Context()
        return Account(attributes, links, context)
    several_topics = shared_topic(records) is None
    several_partitions = shared_partition(records) is None
    links = []
    # Of too many links the SDK keeps the newest: only those are built.
    for record in reversed(records):
        if len(links) >= config.link_limit:
            break
        created = creation_context_of(record)
        if created is None:
            continue
        about = _attributes_of(config, record)
        if several_topics:
            about[MESSAGING_DESTINATION_NAME] = record.topic
        if several_partitions:
            about[MESSAGING_DESTINATION_PARTITION_ID] = partition_id(record.partition)
        links.append(Link(created, about))
    links.reverse()
    return Account({MESSAGING_BATCH_MESSAGE_COUNT: len(records)}, links, Context())


def _attributes_of(config: Config, record: Record) -> Attributes:
    attributes = message_attributes(
        record.offset,
        message_key(record.key) if config.capture_message_key else None,
        record.serialized_value_size == -1,
    )
    if config.capture_message_size:
        attributes.update(body_size(record.serialized_value_size))
    if config.capture_headers:
        attributes.update(captured_headers(config, record.headers))
    return attributes


def captured_headers(config: Config, headers: Any) -> Attributes:
    """What `capture_headers` asks for; the propagators' own fields never."""
    return header_attributes(
        headers, lambda name: not is_propagated(name) and config.captures(name)
    )


def creation_context_of(record: Record) -> SpanContext | None:
    """The creation context that a record carries, if it does."""
    return creation_context(_extract(record))


def _extract(record: Record) -> Context:
    try:
        return extract(record.headers)
    except Exception:
        report("extract the context of a record")
        return Context()
