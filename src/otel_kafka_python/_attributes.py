"""Pure functions from facts to span names and attributes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from otel_kafka_python._semconv import (
    MESSAGING_CLIENT_ID,
    MESSAGING_CONSUMER_GROUP_NAME,
    MESSAGING_DESTINATION_NAME,
    MESSAGING_DESTINATION_PARTITION_ID,
    MESSAGING_KAFKA_CLUSTER_ID,
    MESSAGING_KAFKA_MESSAGE_KEY,
    MESSAGING_KAFKA_MESSAGE_TOMBSTONE,
    MESSAGING_KAFKA_OFFSET,
    MESSAGING_OPERATION_NAME,
    MESSAGING_OPERATION_TYPE,
    MESSAGING_SYSTEM,
    NETWORK_PEER_ADDRESS,
    NETWORK_PEER_PORT,
    SERVER_ADDRESS,
    SERVER_PORT,
)

Attributes = dict[str, Any]

_LEGAL_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")


def legal_topic(topic: object) -> str | None:
    """The topic if it is one that Kafka could have, so that it may be a name."""
    if isinstance(topic, str) and _LEGAL_TOPIC.fullmatch(topic):
        return topic
    return None


def span_name(operation: str, topic: str | None) -> str:
    """`{messaging.operation.name} {messaging.destination.name}` (Span name)."""
    return operation if topic is None else f"{operation} {topic}"


def without_absent(attributes: Mapping[str, Any]) -> Attributes:
    """The attributes that have a value: 0 and "" are values, None is not."""
    return {key: value for key, value in attributes.items() if value is not None}


def operation_attributes(
    operation: str,
    operation_type: str,
    topic: str | None,
    partition: int | None,
    group: str | None,
    server: tuple[str, int] | None,
) -> Attributes:
    """What a span has at its creation and its duration metric carries, too."""
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
    """What only a span has of the client and its cluster."""
    return without_absent(
        {MESSAGING_CLIENT_ID: client_id, MESSAGING_KAFKA_CLUSTER_ID: cluster_id}
    )


def peer_attributes(peer: tuple[str, int] | None) -> Attributes:
    """Which broker it was, if its address is known as an IP literal."""
    if peer is None:
        return {}
    return {NETWORK_PEER_ADDRESS: peer[0], NETWORK_PEER_PORT: peer[1]}


def partition_id(partition: int | None) -> str | None:
    """`messaging.destination.partition.id`, which is a string."""
    return None if partition is None else str(partition)


def message_attributes(
    offset: int | None, key: str | None, tombstone: bool
) -> Attributes:
    """What belongs to one message: on a span of one, on a link of a batch."""
    attributes: Attributes = {}
    if offset is not None and offset >= 0:
        attributes[MESSAGING_KAFKA_OFFSET] = offset
    if key is not None:
        attributes[MESSAGING_KAFKA_MESSAGE_KEY] = key
    if tombstone:
        attributes[MESSAGING_KAFKA_MESSAGE_TOMBSTONE] = True
    return attributes


def message_key(key: object) -> str | None:
    """`messaging.kafka.message.key`, where the key has one unambiguous text form.

    That is a str, an int, or bytes that are printable UTF-8. A str that has no
    UTF-8 form (lone surrogates) has none: no exporter could encode it.
    """
    if isinstance(key, bytes):
        try:
            text = key.decode()
        except UnicodeDecodeError:
            return None
        return text if text.isprintable() else None
    if isinstance(key, str):
        return None if re.search("[\ud800-\udfff]", key) else key
    if isinstance(key, int) and not isinstance(key, bool):
        try:
            return str(key)
        except ValueError:  # Python writes no integer of so many digits
            return None
    return None
