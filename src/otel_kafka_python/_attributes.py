"""Pure functions from facts to attributes and span names."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

from otel_kafka_python._kafka import ClientMetric, Server, partition_number, plain
from otel_kafka_python._safety import raise_signalled, text_of
from otel_kafka_python._semconv import (
    ERROR_TYPE,
    EXCEPTION_MESSAGE,
    EXCEPTION_STACKTRACE,
    EXCEPTION_TYPE,
    KAFKA_PIPELINE_SOURCE,
    MESSAGING_CLIENT_ID,
    MESSAGING_CONSUMER_GROUP_NAME,
    MESSAGING_DESTINATION_NAME,
    MESSAGING_DESTINATION_PARTITION_ID,
    MESSAGING_HEADER_PREFIX,
    MESSAGING_KAFKA_CLUSTER_ID,
    MESSAGING_KAFKA_MESSAGE_KEY,
    MESSAGING_KAFKA_MESSAGE_TOMBSTONE,
    MESSAGING_KAFKA_OFFSET,
    MESSAGING_MESSAGE_BODY_SIZE,
    MESSAGING_OPERATION_NAME,
    MESSAGING_OPERATION_TYPE,
    MESSAGING_SYSTEM,
    NETWORK_PEER_ADDRESS,
    NETWORK_PEER_PORT,
    SERVER_ADDRESS,
    SERVER_PORT,
)

Attributes = dict[str, Any]

_SURROGATES = re.compile("[\ud800-\udfff]")
_QUEUE_TIME_ATTRIBUTES = (
    MESSAGING_DESTINATION_NAME,
    MESSAGING_DESTINATION_PARTITION_ID,
    MESSAGING_CONSUMER_GROUP_NAME,
)
_LEGAL_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")


def legal_topic(topic: object) -> str | None:
    """The topic if Kafka accepts its name, else None."""
    name: object = plain(topic)
    return name if isinstance(name, str) and _LEGAL_TOPIC.fullmatch(name) else None


def span_name(operation: str, topic: str | None) -> str:
    """`{messaging.operation.name} {messaging.destination.name}` (Span name)."""
    return operation if topic is None else f"{operation} {topic}"


def without_absent(attributes: Mapping[str, Any]) -> Attributes:
    """The attributes that have a value: 0 and "" are values, None is not."""
    return {key: value for key, value in attributes.items() if value is not None}


def operation_attributes(
    operation: str,
    operation_type: str | None,
    topic: str | None,
    partition: int | None,
    group: str | None,
    server: Server | None,
) -> Attributes:
    """The attributes of a span at its creation, and of its duration metric."""
    address, port = server or (None, None)
    return without_absent(
        {
            MESSAGING_SYSTEM: "kafka",
            MESSAGING_OPERATION_NAME: operation,
            MESSAGING_OPERATION_TYPE: operation_type,
            MESSAGING_DESTINATION_NAME: topic,
            MESSAGING_DESTINATION_PARTITION_ID: partition_id(partition),
            MESSAGING_CONSUMER_GROUP_NAME: group,
            SERVER_ADDRESS: address,
            SERVER_PORT: port,
        }
    )


def client_attributes(client_id: str | None, cluster_id: str | None) -> Attributes:
    """The attributes of the client and its cluster, which only spans have."""
    return without_absent(
        {MESSAGING_CLIENT_ID: client_id, MESSAGING_KAFKA_CLUSTER_ID: cluster_id}
    )


def without_operation_type(attributes: Attributes) -> Attributes:
    """The attributes for instruments that belong to one operation type."""
    return {k: v for k, v in attributes.items() if k != MESSAGING_OPERATION_TYPE}


def peer_attributes(peer: Server | None) -> Attributes:
    """The broker that answered, if its address is known as an IP literal."""
    if peer is None or not peer.is_ip:
        return {}
    return {NETWORK_PEER_ADDRESS: peer.address, NETWORK_PEER_PORT: peer.port}


def error_attributes(error_type: str) -> Attributes:
    """`error.type` (Recording errors)."""
    return {ERROR_TYPE: error_type}


def exception_attributes(error: BaseException) -> Attributes:
    """The attributes of an exception's event (Exceptions in logs)."""
    return {
        EXCEPTION_TYPE: _qualified_name(type(error)),
        EXCEPTION_MESSAGE: text_of(error),
        EXCEPTION_STACKTRACE: "".join(traceback.format_exception(error)),
    }


def _qualified_name(cls: type[BaseException]) -> str:
    if cls.__module__ == "builtins":
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"


def partition_attributes(partition: int | None) -> Attributes:
    """The partition, if it is known."""
    return without_absent({MESSAGING_DESTINATION_PARTITION_ID: partition_id(partition)})


def queue_time_attributes(count_attributes: Attributes) -> Attributes:
    """The attributes of the histogram of queue time, among those of counted records."""
    return {
        name: count_attributes[name]
        for name in _QUEUE_TIME_ATTRIBUTES
        if name in count_attributes
    }


def pipeline_attributes(source: str, count_attributes: Attributes) -> Attributes:
    """The attributes of the latency of pipelines: from where, and to whom.

    Args:
        source: The topic of the first send.
        count_attributes: Those of the counted records.
    """
    attributes = queue_time_attributes(count_attributes)
    attributes.pop(MESSAGING_DESTINATION_PARTITION_ID, None)
    attributes[KAFKA_PIPELINE_SOURCE] = source
    return attributes


def client_metric_attributes(
    metric: ClientMetric,
    client_id: str | None,
    cluster_id: str | None,
    group: str | None,
) -> Attributes:
    """The attributes of a client's own metric.

    The names are those of the Java agent, which has no group. The group is added
    because clients without an id of their own share one, and lag belongs to a group.
    """
    of_client = {
        "client-id": client_id,
        MESSAGING_KAFKA_CLUSTER_ID: cluster_id,
        MESSAGING_CONSUMER_GROUP_NAME: group,
    }
    return {**metric.tags, **without_absent(of_client)}


def partition_id(partition: object) -> str | None:
    """`messaging.destination.partition.id`, which is a string."""
    number = partition_number(partition)
    return None if number is None else str(number)


def add_message(
    attributes: Attributes,
    offset: int | None,
    key: str | None = None,
    size: int | None = None,
) -> Attributes:
    """Add the attributes of one message's offset, key and size.

    Args:
        attributes: The attributes to add to; they are also returned.
        offset: The offset, if there is one.
        key: The text of the key, if it is recorded.
        size: The size of the value in bytes, if it is recorded; -1 for a tombstone.
    """
    if offset is not None and offset >= 0:
        attributes[MESSAGING_KAFKA_OFFSET] = offset
    if key is not None:
        attributes[MESSAGING_KAFKA_MESSAGE_KEY] = key
    if size == -1:
        attributes[MESSAGING_KAFKA_MESSAGE_TOMBSTONE] = True
    elif size is not None and size >= 0:
        attributes[MESSAGING_MESSAGE_BODY_SIZE] = size
    return attributes


def header_attributes(
    headers: object, is_captured: Callable[[str], bool]
) -> Attributes:
    """`messaging.header.<name>`: the values of a header, always as a list of str.

    Args:
        headers: A list of `(str, bytes)`. Anything else is ignored: kafka-python
            rejects it.
        is_captured: Whether a header of this name is captured.
    """
    captured: dict[str, list[str]] = {}
    for header in headers if isinstance(headers, list) else ():
        if not isinstance(header, tuple) or len(header) != 2:  # noqa: PLR2004 (a pair)
            continue
        name, value = header
        # No exporter could encode a name without a UTF-8 form (lone surrogates).
        if (
            isinstance(name, str)
            and isinstance(value, bytes)
            and is_captured(name)
            and not _SURROGATES.search(name)
        ):
            text = value.decode(errors="replace")
            captured.setdefault(MESSAGING_HEADER_PREFIX + name, []).append(text)
    return {**captured}


def queue_seconds(timestamp: object, now: int) -> float | None:
    """How long ago a record was written; never negative, even if the clocks differ.

    Args:
        timestamp: The record's timestamp, in milliseconds since the epoch; -1 or None
            if it has none.
        now: Nanoseconds since the epoch.
    """
    if not isinstance(timestamp, int) or timestamp < 0:
        return None
    return max(0.0, now / 1e9 - timestamp / 1e3)


def message_key(key: object) -> str | None:
    """`messaging.kafka.message.key`, if the key has one unambiguous text form.

    This is the text of a str, an int, a float, a UUID or UTF-8 bytes, if it is
    printable. A str without a UTF-8 form (lone surrogates) is not printable.
    """
    try:
        if isinstance(key, (bytes, bytearray)):
            text = key.decode()
        elif isinstance(key, str):
            text = plain(key)
        elif isinstance(key, int) and not isinstance(key, bool):
            text = str(int(key))
        elif isinstance(key, (float, UUID)):
            text = str(key)
        else:
            return None
        if text.isprintable():
            return text
    except Exception:
        # The bytes are not UTF-8, the number has too many digits for Python, or a class
        # of the application raises an exception of its own.
        raise_signalled()
    return None
